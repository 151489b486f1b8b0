"""Whether a job starts again: decisions that need no cluster, but for what sinfo answers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.launch.diagnosis import CAUSES
from megatron_txssm.launch.requeue import (
    MAX_IDLE_ATTEMPTS,
    RETRIED,
    idle_attempts,
    refusal,
    requeue,
    spare_nodes_refusal,
)
from megatron_txssm.launch.run_folder import Attempt
from tests.launch.some_attempt import some_attempt


def ended(run: Path, cause: str, number: int = 1, last_step: int | None = 20, **fields: object) -> Attempt:
    """An attempt from step 10 to `last_step`."""
    return some_attempt(run, number, cause=cause, last_step=last_step, **fields)


@pytest.mark.parametrize("cause", sorted(RETRIED))
def test_what_came_further_may_start_again(tmp_path: Path, cause: str) -> None:
    assert refusal(ended(tmp_path, cause), [], max_requeues=1) is None


@pytest.mark.parametrize("cause", sorted(set(CAUSES) - RETRIED))
def test_what_would_end_the_same_way_may_not(tmp_path: Path, cause: str) -> None:
    assert refusal(ended(tmp_path, cause), [], max_requeues=10) == "another try would end the same way"


@pytest.mark.parametrize("cause", sorted(RETRIED))
@pytest.mark.parametrize("last_step", [None, 9, 10])
def test_what_came_no_further_may_not(tmp_path: Path, cause: str, last_step: int | None) -> None:
    why_not = refusal(ended(tmp_path, cause, last_step=last_step), [], max_requeues=10)
    assert why_not == "this attempt came no further than those before it"


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
        # No failures, however many.
        *(ended(tmp_path, cause, 3 + n) for n, cause in enumerate(["time_limit", "preempted", "node_failure"] * 4)),
        ended(tmp_path, "failed", 20, job_id="20"),
    ]
    attempt = ended(tmp_path, "failed", 21)
    assert refusal(attempt, before, max_requeues=3) is None
    assert refusal(attempt, before, max_requeues=2) == "it has failed 2 times before (--max-requeues 2)"
    assert refusal(attempt, [], max_requeues=0) is not None


@pytest.mark.parametrize("cause", ["time_limit", "stopped"])
def test_time_limits_are_no_failures(tmp_path: Path, cause: str) -> None:
    before = [ended(tmp_path, "failed", number) for number in range(1, 6)]
    assert refusal(ended(tmp_path, cause, 6), before, max_requeues=0) is None


def test_idle_attempts_in_a_row(tmp_path: Path) -> None:
    idle = [ended(tmp_path, "node_failure", number, last_step=10) for number in range(1, 8)]
    further = ended(tmp_path, "node_failure", 8)
    other = ended(tmp_path, "failed", 9, last_step=10, job_id="20")
    assert idle_attempts([], "21") == 0
    assert idle_attempts(idle[:2], "21") == 2
    assert idle_attempts([*idle[:2], further], "21") == 0
    assert idle_attempts([*idle[:2], further, idle[2]], "21") == 1
    # These had no chance.
    taken = [ended(tmp_path, cause, 10, last_step=10) for cause in ("preempted", "requeued")]
    assert idle_attempts([*taken, idle[0], *taken, idle[1], *taken], "21") == 2
    # Of a job before this one: whoever submitted it again wants another try.
    assert idle_attempts([*idle, other], "21") == 0
    assert idle_attempts([other, *idle[:MAX_IDLE_ATTEMPTS]], "21") == MAX_IDLE_ATTEMPTS


@pytest.fixture
def sinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stand-in answers; without the file it fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    answer, asked = folder / "answer", folder / "asked"
    (folder / "sinfo").write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{asked}'\ncat '{answer}' 2> /dev/null && exit 0\n"
        "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    (folder / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return answer


def unfit(run: Path, *nodes: str) -> Attempt:
    return some_attempt(run, failed_nodes={node: ["no GPU"] for node in nodes})


@pytest.mark.parametrize("state", ["idle", "alloc", "mix", "comp", "resv", "plnd", "idle~", "idle#"])
def test_a_node_that_can_take_the_place(tmp_path: Path, sinfo: Path, state: str) -> None:
    sinfo.write_text(f"n1 alloc\nn2 alloc\nn3 {state}\n")
    assert spare_nodes_refusal(unfit(tmp_path, "n2"), "main") is None
    words = (sinfo.parent / "asked").read_text().splitlines()
    assert "--partition=main" in words and "--Node" in words


@pytest.mark.parametrize(
    "state", ["down", "down*", "drain", "drain*", "drng", "drng@", "fail", "failg", "maint", "unk", "idle*", "inval"]
)
def test_a_node_that_cannot(tmp_path: Path, sinfo: Path, state: str) -> None:
    sinfo.write_text(f"n1 alloc\nn2 alloc\nn3 {state}\n")
    why_not = spare_nodes_refusal(unfit(tmp_path, "n2"), "main")
    assert why_not == "partition main has no node that could take the place of n2"


def test_an_unfit_node_is_no_spare_node(tmp_path: Path, sinfo: Path) -> None:
    sinfo.write_text("n1 alloc\nn2 idle\nn3 drain\n")
    assert spare_nodes_refusal(unfit(tmp_path, "n2"), "main") is not None
    sinfo.write_text("n1 alloc\nn2 idle\n")
    assert spare_nodes_refusal(unfit(tmp_path, "n2"), "main") is not None


def test_where_every_node_is_unfit_the_nodes_are_not_to_blame(tmp_path: Path, sinfo: Path) -> None:
    sinfo.write_text("n1 idle\nn2 idle\nn3 idle\nn4 idle\n")
    assert spare_nodes_refusal(unfit(tmp_path, "n1", "n2"), "main") == "every node failed the preflight"


def test_a_silent_controller_is_named(tmp_path: Path, sinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_txssm.launch.requeue.REQUEUE_SECONDS", 0)
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        spare_nodes_refusal(unfit(tmp_path, "n2"), "main")


@pytest.fixture
def signal_mask() -> Iterator[None]:
    """A requeue blocks SIGTERM for the rest of the process's life."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.usefixtures("signal_mask")
def test_a_requeue_keeps_the_nodes_that_were_left_out_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_txssm.launch import slurm

    said: list[tuple[str, ...]] = []

    def run_slurm(*command: str, **_: object) -> str:
        said.append(command)
        if len(said) == 1:
            raise UserError("scontrol requeue 21: Unable to contact slurm controller (connect failure)")
        return ""

    job = slurm.Job("21", "x", "RUNNING", "None", "n[1-2]", "main", Path("/r/pretrain.sbatch"), "n[7-8]", 0)
    monkeypatch.setattr(slurm, "queue", lambda: [job])
    monkeypatch.setattr(slurm, "hostnames", lambda nodes: {"n[7-8]": ["n7", "n8"], "": []}[nodes])
    monkeypatch.setattr(slurm, "run_slurm", run_slurm)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # Which here goes on to live.
    with pytest.raises(UserError, match="was requeued, but Slurm did not end it"):
        requeue("21", ["n2"])
    assert said == [("scontrol", "requeue", "21")] * 2 + [("scontrol", "update", "JobId=21", "ExcNodeList=n7,n8,n2")]
    said[1:] = []
    with pytest.raises(UserError, match="was requeued"):
        requeue("21", [])
    assert said[1:] == [("scontrol", "requeue", "21")]


@pytest.mark.usefixtures("signal_mask")
def test_a_requeue_that_slurm_refuses_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_txssm.launch import slurm

    said: list[tuple[str, ...]] = []

    def run_slurm(*command: str, **_: object) -> str:
        said.append(command)
        raise UserError("scontrol requeue 21: Requested operation is presently disabled")

    monkeypatch.setattr(slurm, "run_slurm", run_slurm)
    with pytest.raises(UserError, match="presently disabled"):
        requeue("21", [])
    assert said == [("scontrol", "requeue", "21")]
