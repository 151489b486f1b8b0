"""Why an attempt ended: from what Slurm, srun and the workers left in the run folder."""

import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError
from megatron_txssm.launch.preflight import is_finished, saved_step
from megatron_txssm.launch.run_folder import Attempt, last_step
from megatron_txssm.launch.slurm import run_slurm
from megatron_txssm.recipe.recipe import Recipe

# Cause -> (what happened, what to do about it).
CAUSES: dict[str, tuple[str, str]] = {
    "finished": ("the run is finished", ""),
    "time_limit": ("the time limit came near", "nothing: the job goes on; raise --time if it does so too often"),
    "time_limit_hit": ("the time limit was hit before the run was saved", "raise --stop-before: saving takes longer"),
    "preempted": ("the job was preempted", "nothing: Slurm starts it again when the nodes are free"),
    "node_failure": ("a node was lost", "nothing: Slurm starts it again on other nodes"),
    "requeued": ("somebody requeued the job", "nothing: it starts again by itself"),
    "cancelled": ("somebody cancelled the job", "submit it again to go on from its checkpoint"),
    "step_cancelled": ("somebody cancelled the trainer's step", "submit it again to go on, unless it was requeued"),
    "stopped": ("the trainer was told to save and stop", "submit it again to go on, unless it was requeued"),
    "megatron_exit": (
        "megatron.exit_interval or megatron.exit_duration_in_mins ended the trainer",
        "submit it again to go on from its checkpoint",
    ),
    "hung": (
        "no step was done for too long",
        "look at the stacks in the ranks' logs; where the steps are slow, raise --step-timeout",
    ),
    "preflight": ("a node is not fit to train", "mend the node, or leave it out: --sbatch exclude=NODE"),
    "refused": ("the recipe cannot run", "mend what the message names, and submit it again"),
    "out_of_memory": (
        "a rank ran out of memory",
        "lower training.micro_batch_size, or set parallel.recompute=full; for the host's memory, --sbatch mem=0",
    ),
    "killed": ("a rank was killed by a signal", "look at the node's system log; memory is the usual reason"),
    "failed": ("a rank failed", "read its log; the same step failing twice is no accident"),
    "connection_lost": (
        "the ranks lost each other, and none of them says why",
        "look at the node and its network; leave it out if it happens again: --sbatch exclude=NODE",
    ),
    "unknown": ("the batch script ended without a word", "look at the node it ran on, the first, and its system log"),
}
# What a rank says when another one has gone.
_CONNECTION = re.compile(
    r"gloo|NCCL|connection|Broken pipe|ProcessGroup|Watchdog|TCPStore|Dist(?:Network|Store)Error", re.IGNORECASE
)
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError", re.IGNORECASE)
# srun: error: n2: task 1: Killed
_TASK = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+?)(?: \(core dumped\))?$", re.MULTILINE)
# *** STEP 3.1 ON n1 CANCELLED AT 2026-11-24T14:08:39 DUE TO PREEMPTION ***
_CANCELLED = re.compile(r"\*\*\* (JOB|STEP) \S+ ON \S+ CANCELLED AT \S+?(?: DUE TO ([A-Z ]+).*)? \*\*\*")
_NODE_FAILURE = re.compile(r"srun: error: Node failure on (\S+)")
_DUE_TO = {
    "PREEMPTION": "preempted",
    "NODE FAILURE": "node_failure",
    "TIME LIMIT": "time_limit_hit",
    "JOB REQUEUE": "requeued",
}
_SIGNALS = {text: number for number in signal.Signals if (text := signal.strsignal(number))}


@dataclass(frozen=True)
class Failure:
    """A rank's end."""

    rank: int
    # "killed by SIGKILL", or "RuntimeError: …"
    text: str
    # The signal's number, None for an exception or an exit code.
    signal: int | None = None
    # Where srun says so; else it follows from the rank.
    node: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Why an attempt ended."""

    # A key of CAUSES.
    cause: str
    # What exactly; may be empty.
    detail: str = ""
    # The rank and the node where it began.
    rank: int | None = None
    node: str | None = None

    @property
    def summary(self) -> str:
        return CAUSES[self.cause][0]

    @property
    def remedy(self) -> str:
        return CAUSES[self.cause][1]

    def __str__(self) -> str:
        place = "" if self.node is None else f" on {self.node}"
        where = place if self.rank is None else f": rank {self.rank}{place}"
        return f"{self.summary}{where}{': ' if self.detail else ''}{self.detail}"


def close(attempt: Attempt, recipe: Recipe) -> Diagnosis:
    """Complete the record of an attempt that has ended, the last one of its run (without saving it)."""
    attempt.ended = time.time()
    attempt.last_step = last_step(recipe.run_path / "metrics.jsonl")
    attempt.saved_after = saved_step(recipe.checkpoint_path)
    found = diagnose(attempt, is_finished(recipe), attempt.read_output())
    if found.cause in ("unknown", "connection_lost") and (lost := lost_nodes(attempt.nodes)):
        # With the first node the supervisor is lost as well, and nobody is left to say so.
        found = Diagnosis("node_failure", node=lost[0])
    record(attempt, found)
    return found


def record(attempt: Attempt, found: Diagnosis) -> None:
    """Put a diagnosis into the attempt's record."""
    attempt.cause, attempt.detail, attempt.rank, attempt.node = found.cause, found.detail, found.rank, found.node


def recorded(attempt: Attempt) -> Diagnosis | None:
    """The diagnosis in an attempt's record; None where nobody could say yet."""
    if attempt.cause is None:
        return None
    return Diagnosis(attempt.cause, attempt.detail, attempt.rank, attempt.node)


def diagnose(attempt: Attempt, finished: bool, output: str) -> Diagnosis:
    """Why `attempt` ended; `output`: what its job printed meanwhile; `finished`: the last step is saved."""
    if finished:
        return Diagnosis("finished")
    if attempt.failed_nodes:
        node, problems = next(iter(attempt.failed_nodes.items()))
        return Diagnosis("preflight", "; ".join(problems), node=node)
    if attempt.hang is not None:
        return _hang(attempt, attempt.hang)
    cancelled = _CANCELLED.findall(output)
    for _, due in cancelled:
        for text, cause in _DUE_TO.items():
            if due.startswith(text):
                node = _NODE_FAILURE.search(output) if cause == "node_failure" else None
                return Diagnosis(cause, node=node and node[1])
    if attempt.told_to_stop or any(scope == "JOB" for scope, _ in cancelled):
        return Diagnosis("cancelled")
    if attempt.exit_code == 0:
        return Diagnosis("stopped" if (attempt.folder / "stopped").exists() else "megatron_exit")
    return _failure(attempt, output)


def lost_nodes(nodes: list[str]) -> list[str]:
    """Those of `nodes` that do not answer Slurm now; none where Slurm itself does not."""
    try:
        states = run_slurm("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %t")
    except UserError:
        return []
    found = dict(map(str.split, states.splitlines()))
    # The star: no answer.
    return [node for node in nodes if found.get(node, "").startswith("down") or found.get(node, "").endswith("*")]


def _hang(attempt: Attempt, hang: dict[str, Any]) -> Diagnosis:
    silent = hang["silent_ranks"]
    detail = f"none for {hang['seconds']:.0f} s"
    if not silent:
        return Diagnosis("hung", f"{detail}; every rank wrote its stacks into its log")
    ranks = ", ".join(map(str, silent))
    detail += f"; rank{'s' if len(silent) > 1 else ''} {ranks} did not answer, the others wrote their stacks"
    return Diagnosis("hung", detail, silent[0], attempt.node_of(silent[0]))


def _failure(attempt: Attempt, output: str) -> Diagnosis:
    errors = sorted(_recorded_errors(attempt.folder), key=lambda item: (item[0], item[1].rank))
    for _, failure in errors:
        kind, _, text = failure.text.partition(": ")
        if kind == UserError.__name__:
            return Diagnosis("refused", text)
    own = [failure for _, failure in errors if _is_own(failure.text)]
    tasks = list(_failed_tasks(output))
    killed = [failure for failure in tasks if failure.signal not in (None, signal.SIGTERM)]
    if own:
        first = own[0]
        cause = "out_of_memory" if _OUT_OF_MEMORY.search(first.text) else "failed"
    elif _step_was_cancelled(output):
        return Diagnosis("step_cancelled")
    elif killed:
        first = killed[0]
        cause = "out_of_memory" if _OUT_OF_MEMORY.search(first.text) else "killed"
    elif errors:
        first, cause = errors[0][1], "connection_lost"
    elif tasks:
        first, cause = tasks[0], "failed"
    else:
        said = [line for line in output.splitlines() if line.startswith(("srun: error:", "slurmstepd"))]
        return Diagnosis("unknown", said[0] if said else "")
    return Diagnosis(cause, first.text, first.rank, first.node or attempt.node_of(first.rank))


def _is_own(text: str) -> bool:
    """Of this rank, and not of one that it lost. NCCL's own want of memory is."""
    return _OUT_OF_MEMORY.search(text) is not None or _CONNECTION.search(text) is None


def _step_was_cancelled(output: str) -> bool:
    """Before a task had failed: after that srun itself cancels the step."""
    cancelled, task = _CANCELLED.search(output), _TASK.search(output)
    return cancelled is not None and (task is None or cancelled.start() < task.start())


def _recorded_errors(folder: Path) -> Iterator[tuple[float, Failure]]:
    """(time, exception) of the ranks that could still say what ended them, as torch's error handler writes it."""
    for path in folder.glob("rank_*.json"):
        rank = path.stem.removeprefix("rank_")
        try:
            message = json.loads(path.read_bytes())["message"]
            # A failed start has only a text.
            text, extra = (message, {}) if isinstance(message, str) else (message["message"], message["extraInfo"])
            seconds = float(extra.get("timestamp", "inf"))
            yield seconds, Failure(int(rank), " ".join(text.split())[:400])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Cut off, or another's.
            continue


def _failed_tasks(output: str) -> Iterator[Failure]:
    """The tasks that srun says failed, in the order in which it says so."""
    for node, tasks, how in _TASK.findall(output):
        first = re.match(r"\d{1,9}", tasks)
        if first is None:
            continue
        rank = int(first[0])
        if how in _SIGNALS:
            number = _SIGNALS[how]
            yield Failure(rank, f"killed by {number.name}", number, node)
        elif "Out Of Memory" in how:
            yield Failure(rank, "Out Of Memory, says Slurm", signal.SIGKILL, node)
        else:
            yield Failure(rank, how, None, node)
