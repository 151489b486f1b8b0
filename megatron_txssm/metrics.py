"""Reads RUN/metrics.jsonl, written by training/watch/monitor.py: one JSON object per step and per validation."""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from megatron_txssm.typed_json import parse_json

# An object of metrics.jsonl, as training/watch/monitor.py writes it; earlier versions wrote fewer fields. A step has
# "grad_norm", a validation has only its losses, by the names of its sets.
type MetricsLine = dict[str, Any]

_NUMBER = re.compile(rb" ?(\d{1,15})\b")


def perplexity(loss: float) -> float:
    """exp of nats per token; infinity for the loss of a diverged model, beyond what a float holds."""
    return math.exp(loss) if loss < 709 else math.inf


def last_step(metrics: Path, offset: int = 0) -> int | None:
    """The highest step in metrics.jsonl, or in its lines after `offset` bytes; None if there is none.

    Not necessarily the last: a resumed run may have gone back.
    """
    farthest = -1
    for block in _blocks_from_the_end(metrics, offset, 4_000_000):
        # Most lines are skipped: reading backwards, their numbers are smaller.
        if _largest_iteration(block) > farthest:
            for line in reversed(block.splitlines()):
                if _largest_iteration(line) > farthest:
                    step = _step(line)
                    farthest = farthest if step is None else max(farthest, step)
    return None if farthest < 0 else farthest


def current_step(metrics: Path) -> int | None:
    """The step of the last line that has one, as a resumed run may have gone back. Reads only the end of the file."""
    for block in _blocks_from_the_end(metrics, 0, 65_536):
        for line in reversed(block.splitlines()):
            if (step := _step(line)) is not None:
                return step
    return None


def metrics_tail(metrics: Path) -> list[MetricsLine]:
    """The last few hundred lines of metrics.jsonl."""
    offset = metrics.stat().st_size - 65536 if metrics.exists() else 0
    return metrics_lines(metrics, max(0, offset))


def metrics_lines(metrics: Path, begin: int = 0, end: int | None = None) -> list[MetricsLine]:
    """The lines of metrics.jsonl, or of a byte range; a truncated line is left out."""
    return list(each_line(metrics, begin, end))


def each_line(metrics: Path, begin: int = 0, end: int | None = None) -> Iterator[MetricsLine]:
    """The same, one by one: all lines of a long run would take a gigabyte of memory."""
    if not metrics.is_file():
        return
    with metrics.open("rb") as file:
        file.seek(begin)
        rows = file if end is None else file.read(max(0, end - begin)).splitlines()
        yield from (found for row in rows if (found := _line(row)) is not None)


def _largest_iteration(text: bytes) -> int:
    """The largest number that looks like an iteration; -1 if there is none."""
    # Five times as fast as one regular expression for the whole.
    found = map(_NUMBER.match, text.split(b'"iteration":')[1:])
    return max((int(number[1]) for number in found if number), default=-1)


def _line(line: bytes) -> MetricsLine | None:
    """None if it is not a JSON object. A line truncated by a kill may precede it on the same line."""
    for text in (line, line[max(0, line.rfind(b'{"iteration"')) :]):
        # orjson is five times as fast, but refuses NaN, as the loss of a skipped step may be.
        for loads in (orjson.loads, parse_json):
            try:
                found = loads(text)
            except ValueError:
                continue
            return found if isinstance(found, dict) else None
    return None


def _step(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None for a validation or an invalid line."""
    found = _line(line)
    step = found.get("iteration") if found is not None and "grad_norm" in found else None
    return step if isinstance(step, int) else None


def _blocks_from_the_end(path: Path, begin: int, size: int) -> Iterator[bytes]:
    """A file's whole lines, from its end back to the byte `begin`, in blocks of about `size` bytes."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > begin:
            start = max(begin, end - size)
            file.seek(start)
            block = file.read(end - start)
            if start > begin:
                # The text before the first newline belongs to the next block; a line may be longer than a block.
                cut = block.find(b"\n") + 1
                if cut in (0, len(block)):
                    size *= 2
                    continue
                start, block = start + cut, block[cut:]
            yield block
            end = start


def end_last_line(file: Path) -> None:
    """End a line truncated by a kill, so that appended text begins on its own line."""
    with contextlib.suppress(FileNotFoundError), open(file, "rb+") as lines:
        if lines.seek(0, os.SEEK_END) and os.pread(lines.fileno(), 1, lines.tell() - 1) != b"\n":
            lines.write(b"\n")
