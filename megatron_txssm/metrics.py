"""Reads RUN/metrics.jsonl, which training/watch/monitor.py writes: a JSON object for each step and each validation."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NUMBER = re.compile(rb" ?(\d{1,15})\b")


def last_step(metrics: Path, offset: int = 0) -> int | None:
    """The farthest step in metrics.jsonl, or of its lines behind `offset` bytes; None where there is none.

    Not always the last: a resumed run may have gone back.
    """
    farthest = -1
    for block in _blocks_from_the_end(metrics, offset, 4_000_000):
        # All lines but a few are not looked at: from the end backwards, their numbers are smaller.
        if _largest_iteration(block) > farthest:
            for line in reversed(block.splitlines()):
                if _largest_iteration(line) > farthest:
                    step = _step(line)
                    farthest = farthest if step is None else max(farthest, step)
    return None if farthest < 0 else farthest


def current_step(metrics: Path) -> int | None:
    """The step of the last line that has one: a resumed run may have gone back. Only the end of the file is read."""
    for block in _blocks_from_the_end(metrics, 0, 65_536):
        for line in reversed(block.splitlines()):
            if (step := _step(line)) is not None:
                return step
    return None


def metrics_tail(metrics: Path) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl, some hundreds."""
    offset = metrics.stat().st_size - 65536 if metrics.exists() else 0
    return metrics_lines(metrics, max(0, offset))


def metrics_lines(metrics: Path, begin: int = 0, end: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, or of these bytes of it; one that a kill cut off is left out."""
    return list(each_line(metrics, begin, end))


def each_line(metrics: Path, begin: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
    """The same one by one: all lines of a long run take a gigabyte."""
    if not metrics.exists():
        return
    with metrics.open("rb") as file:
        file.seek(begin)
        rows = file if end is None else file.read(max(0, end - begin)).splitlines()
        yield from (found for row in rows if (found := _line(row)) is not None)


def values_by_step(metrics: Path, key: str) -> dict[int, float]:
    """Step -> the value of a key such as "lm loss", in the order of the steps; values that are not finite are left out.

    A resumed run may have written steps again: the last line of a step counts.
    """
    last: dict[int, float] = {}
    for line in each_line(metrics):
        try:
            last[int(line["iteration"])] = float(line[key])
        except (ValueError, KeyError, TypeError):
            continue
    return {step: value for step, value in sorted(last.items()) if math.isfinite(value)}


def _largest_iteration(text: bytes) -> int:
    """Of whatever looks like one; -1 where nothing does."""
    # An expression for the whole would take five times as long.
    found = map(_NUMBER.match, text.split(b'"iteration":')[1:])
    return max((int(number[1]) for number in found if number), default=-1)


def _line(line: bytes) -> dict[str, Any] | None:
    """None where it is no JSON object. What a kill cut off may stand before it, in the same line."""
    for text in (line, line[max(0, line.rfind(b'{"iteration"')) :]):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        return found if isinstance(found, dict) else None
    return None


def _step(line: bytes) -> int | None:
    """The step that a line of metrics.jsonl tells; None for a validation, or what is no line."""
    found = _line(line)
    step = found.get("iteration") if found is not None and "grad_norm" in found else None
    return step if isinstance(step, int) else None


def _blocks_from_the_end(path: Path, begin: int, size: int) -> Iterator[bytes]:
    """A file's whole lines from its end back to the byte `begin`, in blocks of about `size` bytes."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > begin:
            start = max(begin, end - size)
            file.seek(start)
            block = file.read(end - start)
            if start > begin:
                # What stands before the first line's end belongs to the next block; one line may be longer than that.
                cut = block.find(b"\n") + 1
                if cut in (0, len(block)):
                    size *= 2
                    continue
                start, block = start + cut, block[cut:]
            yield block
            end = start


def end_last_line(file: Path) -> None:
    """Let what is appended begin on a line of its own, also where a killed run left half of one."""
    with contextlib.suppress(FileNotFoundError), open(file, "rb+") as lines:
        if lines.seek(0, os.SEEK_END) and os.pread(lines.fileno(), 1, lines.tell() - 1) != b"\n":
            lines.write(b"\n")
