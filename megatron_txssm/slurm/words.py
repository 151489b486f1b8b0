"""Parses what srun, slurmstepd and the batch script print about a job's end, for Slurm 21.08 to 26.05."""

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto

from megatron_txssm.errors import UserError
from megatron_txssm.slurm.hostlist import expand

# srun: error: n2: task 1: Killed
_TASK = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+?)(?: \(core dumped\))?$", re.MULTILINE)
# slurmstepd-n1: error: *** STEP 3.1 ON n1 CANCELLED AT 2026-11-24T14:08:39 DUE TO PREEMPTION ***
# Since 25.05 a cancel is DUE to SIGNAL Terminated, and 26.05 begins the line with [2026-11-24T14:08:39.077] error:
_CANCELLED = re.compile(r"\*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED AT \S+?(?: DUE (?:TO|to) ([^*\n]*))? \*\*\*")
# srun itself cancels the step after a task fails; before 25.05 the line gives no reason and follows the task's line.
_TASK_FAILURE = "TASK FAILURE"
_NODE_FAILURE = re.compile(r"^srun: error: Node failure on ([a-zA-Z][\w.,\[\]-]*)$", re.MULTILINE)
# Printed by slurm/entrypoint.sh, which starts the supervisor.
_SUPERVISOR = re.compile(r"END supervisor: killed by signal (\d+)$", re.MULTILINE)
_SAID = re.compile(r"^(?:srun: error: |slurmstepd|\[[\dT:.-]+\] error: ).*", re.MULTILINE)
_SIGNALS = {text: number for number in signal.Signals if (text := signal.strsignal(number))}


class EndedBySlurm(StrEnum):
    """Slurm's own reasons for the end of a job or a step."""

    PREEMPTED = auto()
    NODE_FAILURE = auto()
    TIME_LIMIT_HIT = auto()
    REQUEUED = auto()


_DUE_TO = {
    "PREEMPTION": EndedBySlurm.PREEMPTED,
    "NODE FAILURE": EndedBySlurm.NODE_FAILURE,
    "TIME LIMIT": EndedBySlurm.TIME_LIMIT_HIT,
    "JOB REQUEUE": EndedBySlurm.REQUEUED,
}


@dataclass(frozen=True)
class Failure:
    """How a rank failed."""

    rank: int
    # "killed by SIGKILL", or "RuntimeError: …"
    text: str
    # The signal's number, None for an exception or an exit code.
    signal: int | None = None
    # As srun reports it; None if it follows from the rank.
    node: str | None = None


def why_slurm_ended_it(output: str) -> tuple[EndedBySlurm, str | None] | None:
    """Slurm's own reason for the end of a job or a step, and the node that it lost."""
    # Each node's slurmstepd prints its own line, and not all state the reason.
    for _, due in _CANCELLED.findall(output):
        for text, reason in _DUE_TO.items():
            if due.startswith(text):
                return reason, _failed_node(output) if reason is EndedBySlurm.NODE_FAILURE else None
    # If the job survives the loss (--no-kill), srun may be the only one to report it, and kills the other ranks.
    lost, task = _NODE_FAILURE.search(output), _TASK.search(output)
    if lost and (task is None or lost.start() < task.start()):
        return EndedBySlurm.NODE_FAILURE, _failed_node(output)
    return None


def _failed_node(output: str) -> str | None:
    """The first node that srun has lost; None if it lost none."""
    found = _NODE_FAILURE.search(output)
    if found is None:
        return None
    try:
        return expand(found[1])[0]
    except UserError:
        return None


def what_killed_the_supervisor(output: str) -> str | None:
    """The signal's name; None if the supervisor was not killed."""
    found = _SUPERVISOR.search(output)
    return signal.Signals(int(found[1])).name if found else None


def job_was_cancelled(output: str) -> bool:
    return any(scope == "JOB" for scope, _ in _CANCELLED.findall(output))


def step_was_cancelled(output: str) -> bool:
    """Whether the step was cancelled before a task failed; after a failure, srun itself cancels it."""
    cancels = (found for found in _CANCELLED.finditer(output) if not (found[2] or "").startswith(_TASK_FAILURE))
    cancelled, task = next(cancels, None), _TASK.search(output)
    return cancelled is not None and (task is None or cancelled.start() < task.start())


def failed_tasks(output: str) -> Iterator[Failure]:
    """The tasks that srun reports as failed, in the order of its reports."""
    for node, tasks, how in _TASK.findall(output):
        first = re.match(r"\d{1,9}", tasks)
        if first is None:
            continue
        rank = int(first[0])
        if how in _SIGNALS:
            number = _SIGNALS[how]
            yield Failure(rank, f"killed by {number.name}", number, node)
        elif "Out Of Memory" in how:
            yield Failure(rank, "out of memory, according to Slurm", signal.SIGKILL, node)
        else:
            yield Failure(rank, how, None, node)


def first_complaint(output: str) -> str:
    """The first error line of srun or slurmstepd; empty if there is none."""
    found = _SAID.search(output)
    return found[0] if found else ""
