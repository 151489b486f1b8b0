"""Goodput: the share of a run's time spent in steps that count, and the time lost to faults, the queue and starts.

Computed from attempts/*/attempt.json and metrics.jsonl. A start without Slurm has no attempt.json, but is noted in
metrics.jsonl (local_attempts.py); the "queue" before it is the time in which the run was stopped.

  wall           from the submission (from the first start if a later submission has overwritten it) to the end of the
                 last attempt, or to now while a job of the run is in the queue
  active         seconds in training steps, each counted once: of a repeated step the last execution counts, as does
                 its line in metrics.jsonl
  repeated       seconds in steps that were repeated later, and the number of repetitions
  queue          from the submission to the first attempt, and between attempts, except for restarts within a job; to
                 now while the job is pending
  start          from the beginning of an attempt to its first step
  other          the rest: validations, saves, hangs, the end of an attempt
  recovery       from the end of an attempt to the first step that no earlier attempt had done; if several attempts
                 failed in between, from the end of the first
"""

import contextlib
import datetime
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt, attempts, job_ids
from megatron_txssm.jobs.local_attempts import local_attempts
from megatron_txssm.jobs.run_jobs import as_typed
from megatron_txssm.metrics import MetricsLine, metrics_lines, metrics_tail
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.submission import read_submission
from megatron_txssm.terminal import print_table

# Reported for the field's largest runs: effective training time, and the time to train again after a fault.
FIELD_ACTIVE, FIELD_RECOVERY_SECONDS = 0.97, 240
# In Attempt.action if the supervisor restarted the trainer without a requeue.
WITHIN_JOB = "within the job"


@dataclass
class Goodput:
    """Seconds, as the module's docstring defines them."""

    wall: float = 0.0
    active: float = 0.0
    repeated: float = 0.0
    queue: float = 0.0
    start: float = 0.0
    attempts: int = 0
    # Distinct steps, and repetitions of steps.
    steps: int = 0
    repeated_steps: int = 0
    recoveries: list[float] = field(default_factory=list)
    # False if metrics.jsonl has lines of an earlier version, without times: start and recovery are unknown then.
    has_times: bool = True

    @property
    def active_share(self) -> float | None:
        return self.active / self.wall if self.wall > 0 else None

    @property
    def recovery(self) -> float | None:
        """The median, in seconds; None without a recovery."""
        return statistics.median(self.recoveries) if self.recoveries else None

    @property
    def other(self) -> float:
        return max(0.0, self.wall - self.active - self.repeated - self.queue - self.start)


def all_attempts(run: Path) -> list[Attempt]:
    """A run's attempts, on Slurm and without it, in order."""
    on_slurm = attempts(run)
    return sorted([*on_slurm, *local_attempts(run, on_slurm)], key=lambda attempt: attempt.started)


def goodput(run: Path, job_state: str | None = None, now: float | None = None) -> Goodput | None:
    """A run's goodput so far; None before its first attempt. `job_state`: squeue's state of its job in the queue."""
    found = all_attempts(run)
    if not found:
        return None
    now = time.time() if now is None else now
    result = Goodput(attempts=len(found))
    steps = _steps(run, found)
    ends = [_end(attempt, of_attempt, now) for attempt, of_attempt in zip(found, steps, strict=True)]
    submitted = _submitted(run, found[0])
    over = now if job_state is not None else ends[-1]
    result.wall = over - submitted
    result.queue = found[0].started - submitted
    for end, before, after in zip(ends, found, found[1:], strict=False):
        result.queue += _queued(end, before, after)
    if job_state == "PENDING":
        result.queue += now - ends[-1]
    _count_steps(result, steps)
    result.has_times = all(step.ended is not None for of_attempt in steps for step in of_attempt)
    if result.has_times:
        for attempt, of_attempt, end in zip(found, steps, ends, strict=True):
            first = (of_attempt[0].ended or 0.0) - (of_attempt[0].measured or 0.0) if of_attempt else end
            result.start += max(0.0, first - attempt.started)
        result.recoveries = list(_recoveries(found, steps, ends))
    return result


def explain_goodput(run: Path, job_state: str | None) -> Iterator[tuple[str, str]]:
    """(name, text) pairs for `txssm why`; empty before the first attempt."""
    found = goodput(run, job_state)
    if found is None:
        return
    yield "goodput", f"{_share(found)} of {_shown(found.wall)} in steps that count (typical: {FIELD_ACTIVE:.0%})"
    yield "recovery", f"{_recovery(found)} (typical: < {FIELD_RECOVERY_SECONDS // 60} min)"
    yield "steps lost", f"{found.repeated_steps} of {found.steps} repeated ({_shown(found.repeated)})"
    start = f", starts {_shown(found.start)}, saves and the rest {_shown(found.other)}" if found.has_times else ""
    yield "time", f"in the queue {_shown(found.queue)}{start}"


def print_goodput() -> int:
    """Print a table for `txssm jobs --goodput`: every run in runs/ and in the queue."""
    try:
        jobs = [job for job in slurm.queue() if not job.is_over and job.script.stem == "pretrain"]
    except UserError as error:
        # The runs' records do not depend on Slurm.
        print(f"warning: {error}; the wall time ends with the last attempt", file=sys.stderr)
        jobs = []
    states = {job.script.parent: job.state for job in jobs if (job.script.parent / "submission.json").is_file()}
    here = {path.parent.resolve() for path in Path("runs").glob("*/metrics.jsonl")}
    here |= {path.parent.parent.parent.resolve() for path in Path("runs").glob("*/attempts/*/attempt.json")}
    rows = []
    for run in sorted(here | set(states)):
        try:
            of_run = goodput(run, states.get(run))
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        if of_run is not None:
            rows.append((as_typed(run), *goodput_cells(of_run).values()))
    if not rows:
        print("no run has started")
        return 0
    print_table(("run", *(f">{name}" for name in goodput_cells(Goodput()))), rows)
    print(f"Typical in the field: {FIELD_ACTIVE:.0%} active, recovery (median) < {FIELD_RECOVERY_SECONDS // 60} min.")
    return 0


def slowness(metrics: Path) -> str:
    """Why a run is slow now, from the last step in metrics.jsonl; empty if it is not slow."""
    steps = [line for line in metrics_tail(metrics) if "grad_norm" in line]
    slow = steps[-1].get("slow") if steps else None
    return f"{slow['fraction']:.0%} of its median throughput: {slow['reason']}" if slow else ""


def goodput_cells(found: Goodput) -> dict[str, str]:
    """Name -> text of the figures in a row of `txssm jobs --goodput`."""
    return {
        "active": _share(found),
        "recovery": _recovery(found),
        "steps lost": f"{found.repeated_steps} of {found.steps}",
        "in queue": _shown(found.queue),
        "wall": _shown(found.wall),
        "attempts": str(found.attempts),
    }


def _share(found: Goodput) -> str:
    return "unknown" if found.active_share is None else f"{found.active_share:.1%}"


def _recovery(found: Goodput) -> str:
    if not found.has_times:
        return "unknown"
    return "none needed" if found.recovery is None else f"{_shown(found.recovery)} ({len(found.recoveries)})"


def _shown(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))


class _Step(NamedTuple):
    """A step's line in metrics.jsonl; fields that earlier versions did not write are None."""

    number: int
    # Seconds since the epoch.
    ended: float | None
    # Measured duration in seconds.
    measured: float | None
    # Duration in seconds: as measured, or, from an earlier version, estimated from the mean throughput of some steps.
    seconds: float


def _steps(run: Path, found: list[Attempt]) -> list[list[_Step]]:
    """The steps of each attempt."""
    bounds = [*(attempt.metrics_offset for attempt in found), None]
    lines = (metrics_lines(run / "metrics.jsonl", begin or 0, end) for begin, end in itertools.pairwise(bounds))
    return [_of_attempt(list(filter(_is_step, of_attempt))) for of_attempt in lines]


def _is_step(line: MetricsLine) -> bool:
    """Whether it is a step's line, with numbers where they belong: others may have written to the file."""
    numbers = (
        line.get(name, 0) for name in ("iteration", "time", "step_seconds", "consumed_tokens", "tokens_per_second")
    )
    return "grad_norm" in line and all(isinstance(each, int | float) and math.isfinite(each) for each in numbers)


def _of_attempt(lines: Sequence[MetricsLine]) -> list[_Step]:
    consumed = [line.get("consumed_tokens", 0) for line in lines]
    batches = [after - before for before, after in itertools.pairwise(consumed)]
    batches = [*(batches[:1] or consumed), *batches]
    means = [batch / max(line.get("tokens_per_second", 0), 1e-9) for batch, line in zip(batches, lines, strict=True)]
    return [
        _Step(int(line["iteration"]), line.get("time"), line.get("step_seconds"), line.get("step_seconds", mean))
        for line, mean in zip(lines, means, strict=True)
    ]


def _count_steps(result: Goodput, steps: list[list[_Step]]) -> None:
    seconds_of: dict[int, float] = {}
    for step in itertools.chain.from_iterable(steps):
        if step.number in seconds_of:
            result.repeated += seconds_of[step.number]
            result.repeated_steps += 1
        seconds_of[step.number] = step.seconds
    result.steps, result.active = len(seconds_of), sum(seconds_of.values())


def _end(attempt: Attempt, steps: list[_Step], now: float) -> float:
    """When an attempt ended, in seconds since the epoch: as its supervisor recorded, otherwise at its last step."""
    if attempt.ended is None:
        return now
    own = attempt.exit_code is not None or attempt.told_to_stop or attempt.hang or attempt.failed_nodes
    last = steps[-1].ended if steps else None
    if own or last is None:
        return attempt.ended
    # Its supervisor died with its node, and the next one wrote the record.
    return min(attempt.ended, last)


def _queued(end: float, before: Attempt, after: Attempt) -> float:
    """Seconds in the queue between two attempts; 0 if the job kept its nodes."""
    within_job = before.job_id == after.job_id and WITHIN_JOB in before.action
    return 0.0 if within_job else max(0.0, after.started - end)


def _recoveries(found: list[Attempt], steps: list[list[_Step]], ends: list[float]) -> Iterator[float]:
    farthest, since = 0, None
    for attempt, of_attempt, end in zip(found, steps, ends, strict=True):
        for step in of_attempt:
            if step.number > farthest:
                farthest = step.number
                if since is not None and step.ended is not None:
                    yield max(0.0, step.ended - since)
                    since = None
        if since is None and attempt.ended is not None:
            since = end


def _submitted(run: Path, first: Attempt) -> float:
    """When the run was submitted, in seconds since the epoch."""
    if first.job_id in job_ids(run):
        with contextlib.suppress(ValueError, TypeError):
            submitted = datetime.datetime.fromisoformat(read_submission(run).get("submitted", ""))
            return min(first.started, submitted.timestamp())
    return first.started
