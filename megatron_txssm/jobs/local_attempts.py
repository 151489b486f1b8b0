"""The attempts of a run without Slurm, which has no attempt.json: from the starts in metrics.jsonl, and ended.json."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.run_jobs import who_trains
from megatron_txssm.metrics import last_step, metrics_lines
from megatron_txssm.training.launch.ended import local_end


@dataclass(frozen=True)
class _Start:
    """A line of metrics.jsonl by which a training says that it starts."""

    # Its bytes in the file.
    offset: int
    # Seconds since the epoch.
    time: float
    host: str
    world_size: int


def local_attempts(run: Path) -> list[Attempt]:
    """One for every start in metrics.jsonl, in order; none for a run of an earlier version, which noted no starts.

    Only the last one's end is recorded. An earlier one counts as ended with its last step (see goodput.py).
    """
    metrics = run / "metrics.jsonl"
    starts = list(_starts(metrics))
    found = []
    for number, (start, after) in enumerate(zip(starts, [*starts[1:], None], strict=False), 1):
        done_before = found[-1].last_step if found else None
        attempt = Attempt(
            folder=run / "attempts" / f"{number:04d}",
            job_id="",
            nodes=[start.host],
            nproc_per_node=start.world_size,
            started=start.time,
            metrics_offset=start.offset,
            done_before=done_before or 0,
        )
        if after is not None:
            attempt.ended = after.time
            attempt.last_step = _last_step(metrics, start.offset, after.offset)
        else:
            attempt.last_step = last_step(metrics, start.offset)
            _set_end(attempt, run, metrics)
        found.append(attempt)
    return found


def _set_end(attempt: Attempt, run: Path, metrics: Path) -> None:
    """How the last attempt ended; it stays open while its process lives."""
    end = local_end(run)
    if end is not None and end["ended"] >= attempt.started:
        attempt.ended, attempt.exit_code, attempt.detail = end["ended"], end["exit_code"], end["what"]
    elif who_trains(run) is None:
        attempt.ended, attempt.detail = metrics.stat().st_mtime, "it was killed, or the machine went down"


def _last_step(metrics: Path, begin: int, end: int) -> int | None:
    steps = [line["iteration"] for line in metrics_lines(metrics, begin, end) if "grad_norm" in line]
    return max(steps, default=None)


def _starts(metrics: Path) -> Iterator[_Start]:
    if not metrics.exists():
        return
    offset = 0
    with metrics.open("rb") as file:
        for row in file:
            if b'"start"' in row:
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    line = json.loads(row)
                    start, about = line["start"], line.get("environment", {})
                    size = int(start.get("world_size", 1))
                    yield _Start(offset, float(line["time"]), str(about.get("host", "")), size)
            offset += len(row)
