"""Finds out why an attempt ended, from what Slurm, srun and the workers left in the run folder."""

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt, Hang, farthest_step
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.diagnosis.causes import (
    cause_of,
    is_of_another_rank,
    meaning,
    remedy,
    shortened,
    suspect,
)
from megatron_txssm.jobs.diagnosis.lost_node import UNCLEAR, lost_nodes
from megatron_txssm.jobs.nodes.node_preflight import is_silence
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm.words import (
    Failure,
    failed_tasks,
    first_complaint,
    job_was_cancelled,
    step_was_cancelled,
    what_killed_the_supervisor,
    why_slurm_ended_it,
)
from megatron_txssm.training.launch.preflight import is_finished, saved_step
from megatron_txssm.training.watch.collective_trace import missing_ranks
from megatron_txssm.typed_json import read_json

# What was missing, by the limit that was exceeded (stall.StallWatch).
_HUNG = {"start": "no first step", "step": "no step", "save": "the checkpoint was not complete"}
# How much of a killed rank's log is read: the cause is at its end.
_LAST_WORDS_BYTES = 4096
# The preflight's messages about a file system that all nodes share.
_NO_ROOM = re.compile(
    r"GB left; a checkpoint takes|has room for \d+ more files|cannot be written: (?:No space left|Disk quota)"
)


@dataclass(frozen=True)
class Diagnosis:
    """Why an attempt ended."""

    # Text if only a later version knows the cause.
    cause: Cause | str
    # Details of the cause; may be empty.
    detail: str = ""
    # The rank and the node where it began.
    rank: int | None = None
    node: str | None = None

    @property
    def summary(self) -> str:
        return meaning(self.cause).summary

    @property
    def remedy(self) -> str:
        """What to do, regardless of the job's present state; remedies.py considers that, too."""
        return remedy(self.cause, self.detail)

    def __str__(self) -> str:
        place = "" if self.node is None else f" on {self.node}"
        where = place if self.rank is None else f": rank {self.rank}{place}"
        return f"{self.summary}{where}{': ' if self.detail else ''}{self.detail}"


def close(attempt: Attempt, recipe: Recipe, *, started_again: bool = False) -> Diagnosis:
    """Complete the record of a run's last attempt, which has ended; does not save it.

    started_again: its job was started again, for no recorded reason.
    """
    attempt.ended = time.time()
    attempt.last_step = farthest_step(recipe.run_path / "metrics.jsonl", attempt)
    attempt.saved_after = saved_step(recipe.checkpoint_path)
    found = diagnose(attempt, is_finished(recipe), attempt.read_output())
    if found.cause in UNCLEAR and (lost := lost_nodes(attempt.nodes)):
        # The supervisor was lost with the first node and could not record it.
        found = Diagnosis(Cause.NODE_FAILURE, node=lost[0])
    elif found == Diagnosis(Cause.UNKNOWN) and started_again:
        # Slurm and the batch script report any other end in the job's output; an unplugged node cannot.
        found = Diagnosis(Cause.NODE_FAILURE, "Slurm lost contact with it and restarted the job", node=attempt.nodes[0])
    record(attempt, found)
    return found


def record(attempt: Attempt, found: Diagnosis) -> None:
    """Put a diagnosis into the attempt's record."""
    attempt.cause, attempt.detail, attempt.rank, attempt.node = found.cause, found.detail, found.rank, found.node


def recorded(attempt: Attempt) -> Diagnosis | None:
    """The diagnosis in an attempt's record; None if there is none yet."""
    if attempt.cause is None:
        return None
    return Diagnosis(attempt.cause, attempt.detail, attempt.rank, attempt.node)


def diagnose(attempt: Attempt, finished: bool, output: str) -> Diagnosis:
    """Why `attempt` ended; `output`: its job's output since it began; `finished`: the last step is saved."""
    if finished:
        return Diagnosis(Cause.FINISHED)
    if attempt.failed_nodes:
        node, problems = next(iter(attempt.failed_nodes.items()))
        if len(attempt.failed_nodes) == len(attempt.nodes):
            found = [text for texts in attempt.failed_nodes.values() for text in texts]
            if all(map(_NO_ROOM.search, found)):
                # All nodes share the file system: others would not have more space.
                return Diagnosis(Cause.DISK_FULL, found[0])
            if all(map(is_silence, found)):
                # No node is at fault.
                return Diagnosis(Cause.PREFLIGHT, found[0])
        return Diagnosis(Cause.PREFLIGHT, "; ".join(problems), node=node)
    if attempt.hang is not None:
        return _hang(attempt, attempt.hang)
    if name := what_killed_the_supervisor(output):
        # Checked first: Slurm ends the step afterwards.
        return Diagnosis(Cause.SUPERVISOR_KILLED, f"killed by {name}")
    if ended := why_slurm_ended_it(output):
        reason, node = ended
        return Diagnosis(Cause(reason), node=node)
    if attempt.told_to_stop or job_was_cancelled(output):
        return Diagnosis(Cause.CANCELLED)
    if attempt.exit_code is not None and attempt.exit_code < 0:
        # Popen's code for a signal. The ranks may survive until the next attempt ends them.
        return Diagnosis(Cause.SRUN_KILLED, f"killed by {signal.Signals(-attempt.exit_code).name}")
    if attempt.exit_code == 0:
        return Diagnosis(Cause.STOPPED if (attempt.folder / "stopped").exists() else Cause.MEGATRON_EXIT)
    return _failure(attempt, output)


def _hang(attempt: Attempt, hang: Hang) -> Diagnosis:
    silent = hang.get("silent_ranks")
    num_ranks = len(attempt.nodes) * attempt.nproc_per_node
    # A later version may know other phases.
    detail = _HUNG.get(hang.get("during", "step"), _HUNG["step"])
    detail += f" for {hang['seconds']:.0f} s" if "seconds" in hang else ""
    if not silent:
        detail += "" if silent is None else "; every rank wrote its stacks to its log"
        if missing := missing_ranks(attempt.folder, num_ranks):
            return Diagnosis(Cause.HUNG, detail, missing[0], attempt.node_of(missing[0]))
        return Diagnosis(Cause.HUNG, detail)
    if len(silent) == num_ranks > 1:
        return Diagnosis(
            Cause.HUNG, f"{detail}; no rank wrote its stacks: the run's file system or the network was unavailable"
        )
    ranks = ", ".join(map(str, silent))
    detail += f"; rank{'s' if len(silent) > 1 else ''} {ranks} did not answer, the others wrote their stacks"
    return Diagnosis(Cause.HUNG, detail, silent[0], attempt.node_of(silent[0]))


def _failure(attempt: Attempt, output: str) -> Diagnosis:
    found = [
        failure for _, failure in sorted(_recorded_errors(attempt.folder), key=lambda item: (item[0], item[1].rank))
    ]
    # A failed disk, GPU or mount explains all other errors, even one that blames the recipe.
    for failure in found:
        if (cause := _cause_of(failure, attempt)) and cause != Cause.OUT_OF_MEMORY:
            return _of(attempt, cause, failure)
    for failure in found:
        kind, _, text = failure.text.partition(": ")
        if kind == UserError.__name__:
            return Diagnosis(Cause.REFUSED, text)
    own = [failure for failure in found if not is_of_another_rank(failure.text)]
    tasks = list(failed_tasks(output))
    killed = [failure for failure in tasks if failure.signal not in (None, signal.SIGTERM)]
    if own:
        return _of(attempt, _cause_of(own[0], attempt) or Cause.FAILED, own[0])
    if step_was_cancelled(output):
        return Diagnosis(Cause.STEP_CANCELLED)
    if killed:
        return _killed(attempt, killed[0], output)
    if found:
        return _of(attempt, Cause.CONNECTION_LOST, found[0])
    if tasks:
        return _of(attempt, Cause.FAILED, tasks[0])
    return Diagnosis(Cause.UNKNOWN, first_complaint(output))


def _of(attempt: Attempt, cause: Cause, failure: Failure) -> Diagnosis:
    if cause in (Cause.REWIND, Cause.DIVERGED):
        # All ranks decided so.
        return Diagnosis(cause, failure.text.partition(": ")[2])
    if origin := suspect(failure.text):
        return Diagnosis(cause, failure.text, *origin)
    return Diagnosis(cause, failure.text, failure.rank, failure.node or attempt.node_of(failure.rank))


def _cause_of(failure: Failure, attempt: Attempt) -> Cause | None:
    missing = re.match(r"FileNotFoundError: .*: '(.+)'$", failure.text)
    if missing and Path(missing[1]).is_relative_to(attempt.run) and os.path.exists(missing[1]):
        # The file is in the run folder and exists here: that node has lost the mount.
        return Cause.NODE_FILE_SYSTEM
    return cause_of(failure.text)


def _killed(attempt: Attempt, failure: Failure, output: str) -> Diagnosis:
    """For a rank that left no record: its log or the job's output may say more than the signal's name."""
    said = [line for line in (*_last_words(attempt, failure.rank), *output.splitlines()) if line.strip()]
    for line in said:
        cause = cause_of(line.strip())
        if cause in (Cause.DISK_FULL, Cause.BAD_GPU, Cause.NODE_FILE_SYSTEM) and cause is not None:
            return _of(attempt, cause, replace(failure, text=f"{failure.text}: {shortened(line)}"))
    if failure.signal == signal.SIGABRT and (lost := [line for line in said if "Watchdog caught collective" in line]):
        # NCCL ends ranks that wait for another.
        return _of(attempt, Cause.CONNECTION_LOST, replace(failure, text=f"{failure.text}: {shortened(lost[0])}"))
    return _of(attempt, Cause.OUT_OF_MEMORY if cause_of(failure.text) == Cause.OUT_OF_MEMORY else Cause.KILLED, failure)


def _last_words(attempt: Attempt, rank: int) -> list[str]:
    """The last lines of a rank's log, if this attempt wrote to it."""
    log = attempt.run / "logs" / f"rank_{rank}.log"
    try:
        with log.open("rb") as file:
            if os.fstat(file.fileno()).st_mtime < attempt.started:
                return []
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _recorded_errors(folder: Path) -> Iterator[tuple[float, Failure]]:
    """(time, error) of the ranks that recorded one, as torch's error handler writes it."""
    for path in folder.glob("rank_*.json"):
        rank = path.stem.removeprefix("rank_")
        try:
            message = read_json(path)["message"]
            # A failed start records only a text.
            text, extra = (message, {}) if isinstance(message, str) else (message["message"], message["extraInfo"])
            seconds = float(extra.get("timestamp", "inf"))
            yield seconds, Failure(int(rank), shortened(text))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Truncated, or another program's file.
            continue
