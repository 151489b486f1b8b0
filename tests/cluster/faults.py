"""What the tests of faults share: a job that has one, and must end as an undisturbed one, without anybody's help."""

import time
from collections.abc import Callable, Sequence

from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.diagnosis.causes import CAUSES
from megatron_txssm.training.watch.collective_trace import explain_hang, missing_ranks
from tests.cluster.training_job import SAVE_INTERVAL, TrainingJob

# Where the fault comes: between two saves.
STEP = 25
# Told to stop, the trainer saves first.
GRACEFUL = {"preempted"}
# Of starts that still meet a lost node before Slurm has given it up.
TOO_EARLY = {"preflight", "node_failure", "connection_lost", "unknown"}

Fault = Callable[[TrainingJob], object]


def check_fault(
    job: TrainingJob,
    fault: Fault,
    cause: str,
    words: Sequence[str],
    undisturbed: dict[int, float],
    lost: str | None = None,
) -> str:
    """Submit a job with these `words`, and disturb it; what that cost: seconds until the next step, repeated steps.

    lost: the node that the fault takes away.
    """
    job.submit(*words)
    job.wait_step(STEP)
    fault(job)
    began, done_before, saved_before = time.monotonic(), job.steps()[-1][0], job.saved()
    job.wait_until(lambda: len(job.attempts()) > 1, "the next attempt")
    offset = job.attempts()[1].metrics_offset
    job.wait_until(lambda: bool(job.steps(offset)), "a step of the next attempt")
    seconds = time.monotonic() - began
    job.wait_over()

    first, *between, second = job.attempts()
    assert second.cause == "finished", job.why()
    if lost is None:
        assert first.cause == cause and not between, job.why()
    else:
        # A dying node resets its connections: the other rank may end, and be recorded, before Slurm has noticed.
        job.wait_until(lambda: job.sandbox.node_states()[lost].startswith("down"), f"Slurm to give {lost} up")
        assert CAUSES[Cause(cause)].summary + f" on {lost}" in job.why("--all").splitlines()[0], job.why("--all")
        assert {attempt.cause for attempt in between} <= TOO_EARLY, job.why("--all")
    assert dict(job.steps()) == undisturbed
    # Nothing is lost beyond the last save.
    repeated = len(job.steps()) - len(undisturbed)
    assert second.saved_before is not None and second.saved_before >= saved_before
    if cause in GRACEFUL:
        assert repeated == 0
    assert repeated <= SAVE_INTERVAL + 1
    if cause in ("killed", "hung"):
        assert (first.rank, first.node) == (1, "n2")
    if cause == "hung":
        assert missing_ranks(first.folder, 2) == [1], explain_hang(first.folder, 2)
    return f"{seconds:5.1f} s to train again, {repeated:2} steps repeated (fault at step {done_before})"
