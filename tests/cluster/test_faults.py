"""Whatever happens to a job, its run ends with the losses of an undisturbed one, bit for bit, without anybody's help.

Each test reports the seconds from the fault to the first step after it, and the steps that were done twice.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.faults import STEP, Fault
from tests.cluster.sandbox import Sandbox
from tests.cluster.training_job import TrainingJob


def preempted(job: TrainingJob) -> None:
    script = job.folder / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 2\n")
    job.sandbox.slurm("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", str(script))


def cancel_step(job: TrainingJob) -> None:
    job.sandbox.slurm("scancel", job.step_id())


def kill_worker(job: TrainingJob) -> None:
    job.process(1).kill()


def stop_worker(job: TrainingJob) -> None:
    job.process(1).suspend()


# name: (what is done, cause in `txssm why`, words of `txssm submit`)
FAULTS: dict[str, tuple[Fault, str, list[str]]] = {
    "preemption": (preempted, "preempted", []),
    "scancel of the step": (cancel_step, "step_cancelled", []),
    "kill -9 of a worker": (kill_worker, "killed", []),
    "SIGSTOP of a worker": (stop_worker, "hung", ["--step-timeout", "60"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_time_and_nothing_else(name: str, disturb: Callable[..., None]) -> None:
    disturb(name, *FAULTS[name])


@pytest.mark.slow
def test_the_time_limit_is_come_before(
    sandbox: Sandbox, data: Path, undisturbed: dict[int, float], tmp_path: Path, report: Callable[[str], None]
) -> None:
    """The limit is shortened when training is under way, however long that took, and extended before the next start.

    The trainer is held until Slurm tells it to stop, so that it cannot finish before.
    """
    job = TrainingJob(sandbox, tmp_path / "job", data)
    job.submit("--time", "60", "--stop-before", "600")
    job.wait_step(STEP)
    before, worker = len(job.attempts()), job.process(1)
    worker.suspend()
    job.set_time_limit(job.minutes() + 9)
    job.wait_until(lambda: "CANCELLED AT" in job.output(), "the signal before the time limit")
    with sandbox.closed("main"):
        worker.resume()
        began = time.monotonic()
        job.wait_until(lambda: sandbox.job_state(job.job) == "PENDING", "the requeue")
        job.set_time_limit(60)
    job.wait_until(lambda: len(job.attempts()) > before, "the next attempt")
    offset = job.attempts()[before].metrics_offset
    job.wait_until(lambda: bool(job.steps(offset)), "a step of the next attempt")
    seconds = time.monotonic() - began
    job.wait_over()
    # A node that the test before had lost may fail the preflight.
    causes = [attempt.cause for attempt in job.attempts() if attempt.cause != "preflight"]
    assert causes == ["time_limit", "finished"], job.why()
    assert job.steps() == list(undisturbed.items())
    report(f"{'time limit':30} {seconds:5.1f} s to train again,  0 steps repeated")


@pytest.mark.slow
def test_the_controllers_death_disturbs_nothing(
    sandbox: Sandbox, data: Path, undisturbed: dict[int, float], tmp_path: Path, report: Callable[[str], None]
) -> None:
    job = TrainingJob(sandbox, tmp_path / "job", data)
    job.submit()
    job.wait_step(STEP)
    job.wait_state_saved()
    sandbox.must("kill-slurmctld")
    before = job.steps()[-1][0]
    job.wait_step(before + 5)
    sandbox.must("start-slurmctld")
    job.wait_over()
    assert [attempt.cause for attempt in job.attempts()] == ["finished"], job.why()
    assert job.steps() == list(undisturbed.items())
    report(f"{'kill of slurmctld':30}   0.0 s to train again,  0 steps repeated")
