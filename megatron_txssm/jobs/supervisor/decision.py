"""Decides what follows an attempt: a restart within the job, a requeue, a requeue with hold, or the job's end."""

from dataclasses import dataclass
from typing import Literal

from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.cause import Cause

# Causes worth retrying. Slurm itself requeues after a preemption; refusals are never retried.
RETRIED = {
    Cause.TIME_LIMIT,
    Cause.TIME_LIMIT_HIT,
    Cause.STOPPED,
    Cause.STEP_CANCELLED,
    Cause.HUNG,
    Cause.OUT_OF_MEMORY,
    Cause.KILLED,
    Cause.FAILED,
    Cause.CONNECTION_LOST,
    Cause.NODE_FAILURE,
    Cause.NODE_FILE_SYSTEM,
    Cause.BAD_GPU,
    Cause.NAN,
    Cause.REWIND,
    Cause.SUPERVISOR_KILLED,
    Cause.SRUN_KILLED,
    Cause.UNKNOWN,
}
# Not failures: a long run may have hundreds of them.
ROUTINE = {Cause.TIME_LIMIT, Cause.TIME_LIMIT_HIT, Cause.STOPPED, Cause.PREEMPTED, Cause.REWIND}
# Causes that may lie in a node: retried even if the attempt did no new step, since other nodes may be better.
_OF_A_NODE = {
    *(Cause.KILLED, Cause.CONNECTION_LOST, Cause.HUNG, Cause.NODE_FAILURE, Cause.NODE_FILE_SYSTEM, Cause.BAD_GPU),
    *(Cause.SUPERVISOR_KILLED, Cause.SRUN_KILLED),
}
# Causes after which a node is excluded at once, and those after which it is excluded when blamed a second time.
_CERTAINLY_OF_A_NODE = {Cause.NODE_FILE_SYSTEM, Cause.BAD_GPU, Cause.NAN}
_BLAMED_TWICE = {Cause.KILLED, Cause.FAILED, Cause.HUNG, Cause.CONNECTION_LOST, Cause.NODE_FAILURE}
# A restart within the job does not help with these.
_NEEDS_A_REQUEUE = ROUTINE | {Cause.SUPERVISOR_KILLED, Cause.UNKNOWN}
# Limit on consecutive attempts without progress, restarts and requeues alike.
MAX_IDLE_ATTEMPTS = 3


@dataclass(frozen=True)
class Decision:
    """`reason` may be empty for a restart or requeue; `leave_out`: nodes to exclude; `take_back`: nodes to use again.

    The nodes in `take_back` were excluded before, and the job lacks others.
    """

    do: Literal["end", "restart", "requeue", "hold"]
    reason: str = ""
    leave_out: tuple[str, ...] = ()
    take_back: tuple[str, ...] = ()

    def __str__(self) -> str:
        without = f" without {', '.join(self.leave_out)}" if self.leave_out else ""
        if self.take_back:
            without += f", and with {', '.join(self.take_back)} again, as no other node is left"
        if self.do == "end":
            return f"the job was not requeued: {self.reason}"
        if self.do == "hold":
            return f"the job was requeued and is held: {self.reason}"
        what = "the job was requeued" if self.do == "requeue" else "the trainer was restarted within the job"
        return f"{what}{without}"


def decide(attempt: Attempt, before: list[Attempt], max_requeues: int, restarts: int, nodes: list[str]) -> Decision:
    """What to do after an attempt that ended without being told to stop.

    `before`: earlier attempts; those of other jobs do not count. `restarts`: how many the job has left. `nodes`: the
    job's nodes, without lost ones. A failed preflight is handled elsewhere (`requeue_without`).
    """
    if attempt.cause == Cause.DISK_FULL:
        return Decision("hold", f"make room, then: scontrol release {attempt.job_id}")
    if why_not := refusal(attempt, before, max_requeues):
        return Decision("end", why_not)
    leave_out = nodes_to_leave_out(attempt, before)
    went_back = attempt.cause == Cause.REWIND
    may_restart = went_back or (restarts > 0 and attempt.cause not in _NEEDS_A_REQUEUE)
    enough = len(set(nodes) - set(leave_out)) >= len(attempt.nodes)
    # Without progress, a restart on the same nodes would most likely fail the same way.
    if may_restart and enough and (attempt.came_further or leave_out or went_back):
        return Decision("restart", leave_out=leave_out)
    return Decision("requeue", leave_out=leave_out)


def refusal(attempt: Attempt, before: list[Attempt], max_requeues: int) -> str | None:
    """Why the trainer must not be started again after an attempt; None if it may."""
    if attempt.cause not in RETRIED:
        return "another attempt would end the same way"
    if attempt.cause == Cause.REWIND:
        # The guard itself limits them.
        return None
    if attempt.cause == Cause.NAN:
        return _same_nan(attempt, before)
    if not attempt.came_further:
        if attempt.cause not in _OF_A_NODE:
            return "this attempt made no progress"
        if (idle := idle_attempts([*before, attempt], attempt.job_id)) >= MAX_IDLE_ATTEMPTS:
            return f"{idle} attempts in a row made no progress"
    if attempt.cause in ROUTINE:
        return None
    failures = [old for old in before if old.job_id == attempt.job_id and old.cause in RETRIED - ROUTINE]
    if len(failures) >= max_requeues:
        return f"it has failed {len(failures)} times before (--max-requeues {max_requeues})"
    return None


def _same_nan(attempt: Attempt, before: list[Attempt]) -> str | None:
    """Why NaN is not retried: other GPUs computed it at the same step, too, so the run diverges. Otherwise None."""
    for old in before:
        if old.job_id == attempt.job_id and old.cause == Cause.NAN and (old.last_step or 0) >= (attempt.last_step or 0):
            return f"other GPUs computed it, too: attempt {old.number} ended at the same step"
    return None


def idle_attempts(before: list[Attempt], job_id: str) -> int:
    """A job's last attempts in a row without progress, except preemptions, requeues, full disks and rewinds."""
    count = 0
    for attempt in reversed(before):
        if attempt.job_id != job_id or attempt.came_further:
            break
        count += attempt.cause not in (Cause.PREEMPTED, Cause.REQUEUED, Cause.DISK_FULL, Cause.REWIND)
    return count


def nodes_to_leave_out(attempt: Attempt, before: list[Attempt]) -> tuple[str, ...]:
    """The node of the failure, if it is certainly at fault, or blamed for the second time in this job."""
    if attempt.node is None:
        return ()
    if attempt.cause in _CERTAINLY_OF_A_NODE:
        return (attempt.node,)
    blamed = [old for old in before if old.job_id == attempt.job_id and old.node == attempt.node]
    if attempt.cause in _BLAMED_TWICE and any(old.cause in _BLAMED_TWICE for old in blamed):
        return (attempt.node,)
    return ()
