"""The attempts of a run without Slurm, which has no attempt.json: from the starts in metrics.jsonl, and ended.json."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.holders import is_held
from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.metrics import MetricsLine, last_step, metrics_lines
from megatron_txssm.training.launch.ended import local_end
from megatron_txssm.typed_json import parse_json


@dataclass(frozen=True)
class _Start:
    """A line of metrics.jsonl that a training writes with its first step."""

    # Its bytes in the file.
    offset: int
    # When its process began, in seconds since the epoch.
    time: float
    host: str
    world_size: int


def local_attempts(run: Path, on_slurm: Sequence[Attempt] = ()) -> list[Attempt]:
    """One for every start in metrics.jsonl that is not of an attempt `on_slurm`, in order.

    None for a run of an earlier version, which noted no starts. A start that did no step is not noted. Only the last
    one's end is recorded: an earlier one counts as ended with its last step (see goodput.py).
    """
    metrics = run / "metrics.jsonl"
    starts = list(_starts(metrics))
    for attempt in on_slurm:
        if (own := next((start for start in starts if _is_of(start, attempt)), None)) is not None:
            starts.remove(own)
    beginnings = sorted(
        [(start.offset, start.time) for start in starts] + [(a.metrics_offset, a.started) for a in on_slurm]
    )
    found: list[Attempt] = []
    for number, start in enumerate(starts, 1 + len(on_slurm)):
        attempt = Attempt(
            folder=run / "attempts" / f"{number:04d}",
            job_id="",
            nodes=[start.host],
            nproc_per_node=start.world_size,
            started=start.time,
            metrics_offset=start.offset,
            done_before=(found[-1].last_step if found else None) or 0,
        )
        after = next((later for later in beginnings if later > (start.offset, start.time)), None)
        if after is not None:
            offset, attempt.ended = after
            attempt.last_step = _last_step(metrics, start.offset, offset)
        else:
            attempt.last_step = last_step(metrics, start.offset)
            _set_end(attempt, run, metrics)
        found.append(attempt)
    return found


def _is_of(start: _Start, attempt: Attempt) -> bool:
    """Whether a start may be that of an attempt on Slurm: of these, the first is."""
    return start.offset >= attempt.metrics_offset and (attempt.ended is None or start.time <= attempt.ended)


def _set_end(attempt: Attempt, run: Path, metrics: Path) -> None:
    """How the last attempt ended; it stays open while its process lives."""
    end = local_end(run)
    if end is not None and end.ended >= attempt.started:
        attempt.ended, attempt.exit_code, attempt.detail = end.ended, end.exit_code, end.what
    elif not is_held(run):
        attempt.ended, attempt.detail = metrics.stat().st_mtime, "it was killed, or the machine went down"


def _last_step(metrics: Path, begin: int, end: int) -> int | None:
    steps = (line.get("iteration") for line in metrics_lines(metrics, begin, end) if "grad_norm" in line)
    return max((step for step in steps if isinstance(step, int)), default=None)


def _starts(metrics: Path) -> Iterator[_Start]:
    for offset, line in start_lines(metrics):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            host, size = line.get("environment", {}).get("host", ""), line["start"]["world_size"]
            yield _Start(offset, float(line["began"]), str(host), int(size))


def start_lines(metrics: Path) -> Iterator[tuple[int, MetricsLine]]:
    """The lines by which trainings say how they started, each with its first byte's place in the file."""
    if not metrics.is_file():
        return
    offset = 0
    with metrics.open("rb") as file:
        for row in file:
            # Much faster than to parse every step.
            if b'"start"' in row:
                with contextlib.suppress(ValueError):
                    line = parse_json(row)
                    if isinstance(line, dict) and "start" in line:
                        yield offset, line
            offset += len(row)
