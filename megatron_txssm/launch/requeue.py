"""Whether a job starts again after an attempt, and how it is made to."""

import re
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_txssm.errors import UserError
from megatron_txssm.launch import slurm
from megatron_txssm.launch.run_folder import Attempt

# What may go well at the next try. Preemption and the loss of a node are Slurm's to requeue, a refusal is nobody's.
RETRIED = {
    "time_limit",
    "time_limit_hit",
    "stopped",
    "step_cancelled",
    "hung",
    "out_of_memory",
    "killed",
    "failed",
    "connection_lost",
    "unknown",
}
# No failures: a run may well go through hundreds of them.
_ROUTINE = {"time_limit", "time_limit_hit", "stopped"}
# Attempts in a row that came no further, whoever requeued them.
MAX_IDLE_ATTEMPTS = 3
# Where slurmctld is down, a requeue waits for it.
REQUEUE_SECONDS = 900
_NO_ANSWER = re.compile(r"contact|timed out|Zero Bytes|does not answer|[Cc]onnection")


def refusal(attempt: Attempt, before: list[Attempt], max_requeues: int) -> str | None:
    """Why the job must not be requeued after an attempt that has ended, in words; None where it shall.

    `before`: the attempts before it; those of other jobs do not count. Nodes that failed the preflight are another
    matter: `spare_nodes_refusal`.
    """
    if attempt.cause not in RETRIED:
        return "another try would end the same way"
    if not attempt.came_further:
        return "this attempt came no further than those before it"
    if attempt.cause in _ROUTINE:
        return None
    failures = [old for old in before if old.job_id == attempt.job_id and old.cause in RETRIED - _ROUTINE]
    if len(failures) >= max_requeues:
        return f"it has failed {len(failures)} times before (--max-requeues {max_requeues})"
    return None


def idle_attempts(before: list[Attempt], job_id: str) -> int:
    """How many of the last attempts of a job, in a row, came no further; those that had no chance are left out."""
    count = 0
    for attempt in reversed(before):
        if attempt.job_id != job_id or attempt.came_further:
            break
        count += attempt.cause not in ("preempted", "requeued")
    return count


def spare_nodes_refusal(attempt: Attempt, partition: str) -> str | None:
    """Why nodes that failed the preflight cannot be done without; None where others can take their place."""
    if len(attempt.failed_nodes) == len(attempt.nodes):
        return "every node failed the preflight"
    command = ("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %t")
    states = _until(time.monotonic() + REQUEUE_SECONDS, slurm.run_slurm, *command)
    usable = {node for node, state in map(str.split, states.splitlines()) if not _is_lost(state)}
    if len(usable - set(attempt.failed_nodes)) < len(attempt.nodes):
        return f"partition {partition} has no node that could take the place of {', '.join(attempt.failed_nodes)}"
    return None


def _is_lost(state: str) -> bool:
    # The star: it does not answer.
    return state.endswith("*") or state.startswith(("down", "drain", "drng", "fail", "inval", "maint", "unk"))


def requeue(job_id: str, exclude: list[str]) -> NoReturn:
    """Requeue the job that this process belongs to; it does not return: Slurm then kills this process.

    Nodes can be excluded only while the job is pending, which is in the seconds between Slurm's SIGTERM, which neither
    this process nor its scontrol must obey, and its SIGKILL.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    deadline = time.monotonic() + REQUEUE_SECONDS
    if exclude:
        jobs = _until(deadline, slurm.queue)
        excluded = next((job.excluded for job in jobs if job.job_id == job_id), "")
        exclude = [*slurm.hostnames(excluded), *exclude]
    _until(deadline, slurm.run_slurm, "scontrol", "requeue", job_id)
    if exclude:
        update = ("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(exclude)}")
        _until(deadline, slurm.run_slurm, *update)
    time.sleep(REQUEUE_SECONDS)
    raise UserError(f"job {job_id} was requeued, but Slurm did not end it")


def _until[T](deadline: float, call: Callable[..., T], *args: Any) -> T:
    """`call(*args)`, again and again while Slurm does not answer."""
    while True:
        try:
            return call(*args)
        except UserError as error:
            # A refusal stays one.
            if not _NO_ANSWER.search(str(error)) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
