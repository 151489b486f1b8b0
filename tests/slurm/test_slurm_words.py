"""Why Slurm or a person ended a job, in the words of Slurm 21.08 to 26.05."""

import re
from pathlib import Path

import pytest

from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.diagnosis.diagnosis import Diagnosis, diagnose
from megatron_txssm.slurm.words import why_slurm_ended_it
from tests.jobs.some_attempt import some_attempt

# What slurm_words/record.sh does -> the cause.
RECORDED = {
    "kill9": "killed",
    "segv": "killed",
    "exit1": "failed",
    "exit3both": "failed",
    "scancel_step": "step_cancelled",
    "scancel_step_graceful": "step_cancelled",
    "signal_step_term": "stopped",
    "signal_step_kill": "killed",
    "scancel_job": "cancelled",
    "scancel_job_graceful": "cancelled",
    "scancel_full": "cancelled",
    "requeue": "requeued",
    "requeuehold": "requeued",
    "preempted": "preempted",
    "preempted_graceful": "preempted",
    "preempt_cancel": "preempted",
    "preempt_cancel_graceful": "preempted",
    "timelimit": "time_limit_hit",
}
WORDS = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "slurm_words").glob("*.txt"))}
# Not recorded: 21.08 names no node in slurmstepd's lines, 25.05 gives reasons as 26.05 does, but no times.
WORDS["21.08"] = WORDS["22.05.8"].replace("slurmstepd-n1:", "slurmstepd:")
WORDS["25.05"] = re.sub(r"^\[[\dT:.-]+\] error", "slurmstepd-n1: error", WORDS["26.05.5"], flags=re.MULTILINE)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return some_attempt(tmp_path, exit_code=1)


@pytest.mark.parametrize("version", WORDS)
@pytest.mark.parametrize("name", RECORDED)
def test_the_words_of_each_version(attempt: Attempt, version: str, name: str) -> None:
    texts = dict(section.split("\n", 1) for section in WORDS[version].split("=== ")[1:])
    output = texts[name].split("\nSTART")[0]
    code = re.search(r"^END srun (\d+)", output, re.MULTILINE)
    assert code is not None
    attempt.exit_code = int(code[1])
    if name.endswith("term"):
        (attempt.folder / "stopped").touch()
    for told in {False, "told" in output}:
        attempt.told_to_stop = told
        found = diagnose(attempt, finished=False, output=output)
        assert found.cause == RECORDED[name], output
        if name in ("kill9", "segv", "exit1"):
            assert (found.rank, found.node) == (1, "n2")


def test_the_node_that_newer_slurm_lost(attempt: Attempt) -> None:
    output = """\
srun: error: n1: task 0: Exited with exit code 1
srun: Terminating StepId=13.1
srun: error: Node failure on n2
[2026-11-26T06:53:27.009] error: *** JOB 13 ON n1 CANCELLED AT 2026-11-26T06:53:27 DUE TO NODE FAILURE, SEE SLURMCTLD \
LOG FOR DETAILS ***
"""
    assert diagnose(attempt, finished=False, output=output) == Diagnosis("node_failure", node="n2")


def test_the_end_that_srun_makes_after_a_task_failed_is_no_cancel(attempt: Attempt) -> None:
    # Two programs write the output, in whatever order.
    line = "[2026-11-26T06:33:49.077] error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-26T06:33:49 DUE TO {} ***\n"
    task = "srun: error: n2: task 1: Exited with exit code 1\n"
    assert diagnose(attempt, finished=False, output=line.format("TASK FAILURE") + task).cause == "failed"
    cancelled = line.format("SIGNAL Killed").replace("TO SIGNAL", "to SIGNAL")
    assert diagnose(attempt, finished=False, output=cancelled + task).cause == "step_cancelled"


def test_a_node_that_a_job_outlives() -> None:
    """With --no-kill; srun kills the ranks of the other nodes, which are not to blame."""
    output = (
        "srun: error: Node failure on n2\n"
        "srun: error: n1: task 0: Killed\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=12.1\n"
    )
    assert why_slurm_ended_it(output) == ("node_failure", "n2")
    # One that is lost later has not ended the step.
    lines = output.splitlines()
    assert why_slurm_ended_it("\n".join([lines[1], lines[0]])) is None
