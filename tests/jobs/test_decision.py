"""What comes after an attempt: decisions that need no cluster."""

from pathlib import Path

import pytest

from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.diagnosis.causes import CAUSES
from megatron_txssm.jobs.supervisor.decision import MAX_IDLE_ATTEMPTS, RETRIED, Decision, decide, idle_attempts, refusal
from tests.jobs.some_attempt import some_attempt

NODES = ["n1", "n2"]
# After these, an attempt without a new step is worth another one.
OF_A_NODE = {
    *("killed", "connection_lost", "hung", "node_failure", "node_file_system", "bad_gpu"),
    *("supervisor_killed", "srun_killed"),
}


def ended(run: Path, cause: str, number: int = 1, last_step: int | None = 20, **fields: object) -> Attempt:
    """An attempt from step 10 to `last_step`."""
    return some_attempt(run, number, cause=cause, last_step=last_step, **fields)


# --- Whether it starts again at all.


@pytest.mark.parametrize("cause", sorted(RETRIED))
def test_what_came_further_may_start_again(tmp_path: Path, cause: str) -> None:
    assert refusal(ended(tmp_path, cause), [], max_requeues=1) is None


@pytest.mark.parametrize("cause", sorted(set(CAUSES) - RETRIED - {"disk_full"}))
def test_what_would_end_the_same_way_may_not(tmp_path: Path, cause: str) -> None:
    assert refusal(ended(tmp_path, cause), [], max_requeues=10) == "another attempt would end the same way"


@pytest.mark.parametrize("cause", sorted(RETRIED - OF_A_NODE - {"nan", "rewind"}))
@pytest.mark.parametrize("last_step", [None, 9, 10])
def test_what_came_no_further_may_not(tmp_path: Path, cause: str, last_step: int | None) -> None:
    why_not = refusal(ended(tmp_path, cause, last_step=last_step), [], max_requeues=10)
    assert why_not == "this attempt made no progress"


@pytest.mark.parametrize("cause", sorted(OF_A_NODE))
def test_what_a_node_may_have_done_is_tried_three_times(tmp_path: Path, cause: str) -> None:
    idle = [ended(tmp_path, cause, number, last_step=10) for number in range(1, 4)]
    assert refusal(idle[0], [], max_requeues=10) is None
    assert refusal(idle[1], idle[:1], max_requeues=10) is None
    assert refusal(idle[2], idle[:2], max_requeues=10) == "3 attempts in a row made no progress"


def test_one_step_or_a_later_checkpoint_is_further(tmp_path: Path) -> None:
    assert refusal(ended(tmp_path, "failed", last_step=11), [], 10) is None
    # Rank 0's metrics were lost with its node, the checkpoint was not.
    assert refusal(ended(tmp_path, "failed", last_step=None, saved_after=11), [], 10) is None
    assert refusal(ended(tmp_path, "failed", last_step=None, saved_after=10), [], 10) is not None
    # The first checkpoint of all.
    assert refusal(ended(tmp_path, "failed", last_step=None, saved_before=None, saved_after=5), [], 10) is None


def test_failures_are_counted_of_this_job_only(tmp_path: Path) -> None:
    before = [
        ended(tmp_path, "failed", 1),
        ended(tmp_path, "hung", 2),
        # Not failures, however many.
        *(ended(tmp_path, cause, 3 + n) for n, cause in enumerate(["time_limit", "preempted", "stopped"] * 4)),
        ended(tmp_path, "failed", 20, job_id="20"),
    ]
    attempt = ended(tmp_path, "failed", 21)
    assert refusal(attempt, before, max_requeues=3) is None
    assert refusal(attempt, before, max_requeues=2) == "it has failed 2 times before (--max-requeues 2)"
    assert refusal(attempt, [], max_requeues=0) is not None


@pytest.mark.parametrize("cause", ["time_limit", "stopped"])
def test_time_limits_are_not_failures(tmp_path: Path, cause: str) -> None:
    before = [ended(tmp_path, "failed", number) for number in range(1, 6)]
    assert refusal(ended(tmp_path, cause, 6), before, max_requeues=0) is None


def test_a_nan_is_tried_on_other_gpus_once(tmp_path: Path) -> None:
    # The step that computes it never counts as done.
    first = ended(tmp_path, "nan", 1, node="n2")
    assert refusal(first, [], 10) is None
    assert (
        refusal(ended(tmp_path, "nan", 2), [first], 10)
        == "other GPUs computed it, too: attempt 1 ended at the same step"
    )
    # Behind that step, or of a job before: another matter.
    assert refusal(ended(tmp_path, "nan", 2, last_step=21), [first], 10) is None
    assert refusal(ended(tmp_path, "nan", 2, job_id="22"), [first], 10) is None


def test_idle_attempts_in_a_row(tmp_path: Path) -> None:
    idle = [ended(tmp_path, "node_failure", number, last_step=10) for number in range(1, 8)]
    further = ended(tmp_path, "node_failure", 8)
    other = ended(tmp_path, "failed", 9, last_step=10, job_id="20")
    assert idle_attempts([], "21") == 0
    assert idle_attempts(idle[:2], "21") == 2
    assert idle_attempts([*idle[:2], further], "21") == 0
    assert idle_attempts([*idle[:2], further, idle[2]], "21") == 1
    # These had no chance.
    taken = [ended(tmp_path, cause, 10, last_step=10) for cause in ("preempted", "requeued", "disk_full", "rewind")]
    assert idle_attempts([*taken, idle[0], *taken, idle[1], *taken], "21") == 2
    # Of a job before this one: whoever submitted it again wants another try.
    assert idle_attempts([*idle, other], "21") == 0
    assert idle_attempts([other, *idle[:MAX_IDLE_ATTEMPTS]], "21") == MAX_IDLE_ATTEMPTS


# --- How.


def test_a_full_disk_holds_the_job(tmp_path: Path) -> None:
    decision = decide(ended(tmp_path, "disk_full"), [], 10, 3, NODES)
    assert decision == Decision("hold", "make room, then: scontrol release 21")
    assert str(decision) == "the job was requeued and is held: make room, then: scontrol release 21"


@pytest.mark.parametrize("cause", ["killed", "failed", "hung", "out_of_memory", "connection_lost", "step_cancelled"])
def test_a_failure_behind_a_new_step_restarts_within_the_job(tmp_path: Path, cause: str) -> None:
    assert decide(ended(tmp_path, cause, node="n2"), [], 10, 1, NODES) == Decision("restart")
    # None is left; or nothing changed since the last start.
    assert decide(ended(tmp_path, cause, node="n2"), [], 10, 0, NODES) == Decision("requeue")
    if cause in OF_A_NODE:
        assert decide(ended(tmp_path, cause, node="n2", last_step=10), [], 10, 1, NODES) == Decision("requeue")


@pytest.mark.parametrize("cause", ["time_limit", "time_limit_hit", "stopped", "unknown"])
def test_what_needs_a_requeue(tmp_path: Path, cause: str) -> None:
    assert decide(ended(tmp_path, cause), [], 10, 3, NODES) == Decision("requeue")


@pytest.mark.parametrize("cause", ["node_file_system", "bad_gpu", "nan"])
def test_a_node_that_is_certainly_bad_is_left_out_at_once(tmp_path: Path, cause: str) -> None:
    bad = ended(tmp_path, cause, node="n2")
    assert decide(bad, [], 10, 3, NODES) == Decision("requeue", leave_out=("n2",))
    # Another node of the job is spare.
    assert decide(bad, [], 10, 3, [*NODES, "n3"]) == Decision("restart", leave_out=("n2",))
    assert decide(bad, [], 10, 0, [*NODES, "n3"]) == Decision("requeue", leave_out=("n2",))


@pytest.mark.parametrize("last_step", [10, 20])
def test_a_node_that_is_blamed_twice_is_left_out(tmp_path: Path, last_step: int) -> None:
    first = ended(tmp_path, "killed", 1, last_step=last_step, node="n2")
    again = ended(tmp_path, "hung", 2, last_step=last_step, node="n2")
    assert decide(again, [first], 10, 0, NODES) == Decision("requeue", leave_out=("n2",))
    assert decide(ended(tmp_path, "killed", 2, node="n1"), [first], 10, 0, NODES) == Decision("requeue")
    # Of another job, or of what is not a node's fault.
    other = ended(tmp_path, "killed", 1, node="n2", job_id="20")
    assert decide(again, [other], 10, 0, NODES) == Decision("requeue")
    memory = ended(tmp_path, "out_of_memory", 1, node="n2")
    assert decide(again, [memory], 10, 0, NODES) == Decision("requeue")


@pytest.mark.parametrize("last_step", [9, 20])
def test_a_rewind_of_the_spike_guard_restarts_at_once(tmp_path: Path, last_step: int) -> None:
    back = ended(tmp_path, "rewind", 6, last_step=last_step)
    before = [ended(tmp_path, "failed", number, last_step=10) for number in range(1, 6)]
    assert decide(back, before, 0, 0, NODES) == Decision("restart")
    # A node is gone.
    assert decide(back, before, 0, 0, ["n1"]) == Decision("requeue")


def test_a_lost_node_of_a_job_with_spare_ones(tmp_path: Path) -> None:
    lost = ended(tmp_path, "node_failure", node="n2")
    assert decide(lost, [], 10, 3, ["n1", "n3"]) == Decision("restart")
    assert decide(lost, [], 10, 3, ["n1"]) == Decision("requeue")


def test_decisions_in_words() -> None:
    assert str(Decision("requeue", leave_out=("n2", "n3"))) == "the job was requeued without n2, n3"
    assert str(Decision("restart")) == "the trainer was restarted within the job"
    assert str(Decision("end", "no")) == "the job was not requeued: no"
