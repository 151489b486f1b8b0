"""Whatever happens to a job, its run ends with the losses of an undisturbed one, bit for bit, without anybody's help.

Each test reports the seconds from the fault to the first step after it, and the steps that were done twice.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_txssm.training.watch.collective_trace import explain_hang, missing_ranks
from tests.cluster.sandbox import Sandbox
from tests.cluster.training_job import SAVE_INTERVAL, TrainingJob, write_data

# Where the fault comes: between two saves.
STEP = 25
# Told to stop, the trainer saves first.
GRACEFUL = {"preemption", "time limit"}

Fault = Callable[[TrainingJob], object]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(sandbox: Sandbox, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    job = TrainingJob(sandbox, tmp_path_factory.mktemp("undisturbed") / "job", data)
    job.submit()
    job.wait_over()
    assert len(job.attempts()) == 1 and job.attempts()[0].cause == "finished"
    assert [step for step, _ in job.steps()] == list(range(1, 61))
    return dict(job.steps())


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


def power_off(node: str) -> Fault:
    return lambda job: job.sandbox.must("poweroff", node)


def unplug(job: TrainingJob) -> None:
    job.sandbox.must("unplug", "n2")


def lose_node_while_saving(job: TrainingJob) -> None:
    """In the moment in which the next checkpoint is begun and not yet complete."""
    lost = job.process(1)
    while True:
        saved = job.saved()
        folder = job.run / "checkpoints" / f"iter_{saved + SAVE_INTERVAL:07d}"
        job.wait_until(folder.exists, "the next save")
        # Its share of this save is missing from here on, unless the save is over already.
        lost.suspend()
        if job.saved() == saved:
            break
        lost.resume()
    job.sandbox.must("poweroff", "n2")


@pytest.fixture
def whole_again(sandbox: Sandbox) -> Iterator[None]:
    """Mends every node at the end."""
    yield
    sandbox.mend(["n1", "n2", "n3"])


FAULTS: dict[str, tuple[Fault, str, list[str]]] = {
    # name: (what is done, cause in `txssm why`, words of `txssm submit`)
    "preemption": (preempted, "preempted", []),
    "scancel of the step": (cancel_step, "step_cancelled", []),
    "kill -9 of a worker": (kill_worker, "killed", []),
    "SIGSTOP of a worker": (stop_worker, "hung", ["--step-timeout", "60"]),
    "power-off of the second node": (power_off("n2"), "node_failure", []),
    "power-off of the first node": (power_off("n1"), "node_failure", []),
    "unplugged network": (unplug, "node_failure", []),
    "node loss during a save": (lose_node_while_saving, "node_failure", []),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_time_and_nothing_else(
    name: str,
    sandbox: Sandbox,
    data: Path,
    undisturbed: dict[int, float],
    tmp_path: Path,
    whole_again: None,
    report: Callable[[str], None],
) -> None:
    fault, cause, words = FAULTS[name]
    job = TrainingJob(sandbox, tmp_path / "job", data)
    job.submit(*words)
    job.wait_step(STEP)
    fault(job)
    began, done_before, saved_before = time.monotonic(), job.steps()[-1][0], job.saved()
    job.wait_until(lambda: len(job.attempts()) > 1, "the next attempt")
    offset = job.attempts()[1].metrics_offset
    job.wait_until(lambda: bool(job.steps(offset)), "a step of the next attempt")
    seconds = time.monotonic() - began
    job.wait_over()

    first, second = job.attempts()
    assert (first.cause, second.cause) == (cause, "finished"), job.why()
    assert dict(job.steps()) == undisturbed
    # Nothing is lost beyond the last save.
    repeated = len(job.steps()) - len(undisturbed)
    assert second.saved_before is not None and second.saved_before >= saved_before
    if name in GRACEFUL:
        assert repeated == 0
    assert repeated <= SAVE_INTERVAL + 1
    if cause in ("killed", "hung"):
        assert (first.rank, first.node) == (1, "n2")
    if cause == "hung":
        assert missing_ranks(first.folder, 2) == [1], explain_hang(first.folder, 2)
    report(f"{name:30} {seconds:5.1f} s to train again, {repeated:2} steps repeated (fault at step {done_before})")


@pytest.mark.slow
def test_the_time_limit_is_come_before(
    sandbox: Sandbox, data: Path, undisturbed: dict[int, float], tmp_path: Path, report: Callable[[str], None]
) -> None:
    """The trainer is held until Slurm tells it to stop, so that it cannot finish before, however fast the machine."""
    job = TrainingJob(sandbox, tmp_path / "job", data)
    job.submit("--time", "2", "--stop-before", "75")
    job.wait_step(STEP)
    told_before, before = job.output().count("CANCELLED AT"), len(job.attempts())
    worker = job.process(1)
    worker.suspend()
    job.wait_until(lambda: job.output().count("CANCELLED AT") > told_before, "the signal before the time limit")
    worker.resume()
    began = time.monotonic()
    job.wait_until(lambda: len(job.attempts()) > before, "the next attempt")
    offset = job.attempts()[before].metrics_offset
    job.wait_until(lambda: bool(job.steps(offset)), "a step of the next attempt")
    seconds = time.monotonic() - began
    job.wait_over()
    # On a slow machine it comes more than once. A node that the test before had lost may fail the preflight.
    *limited, last = [attempt.cause for attempt in job.attempts() if attempt.cause != "preflight"]
    assert (set(limited), last) == ({"time_limit"}, "finished"), job.why()
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
