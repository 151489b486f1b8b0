"""Reads RUN/metrics.jsonl as arrays over a run's steps."""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_txssm.metrics import MetricsLine, each_line

# The columns of Series that are fields of metrics.jsonl.
_FIELDS = {
    "loss": "lm loss",
    "tokens": "consumed_tokens",
    "tokens_per_second": "tokens_per_second",
    "seconds": "step_seconds",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "time": "time",
}
_COLUMNS = ("step", "attempt", "step_flops", *_FIELDS)


class Losses(NamedTuple):
    """The losses of a validation set, in nats per token; float64 [V], step int64 [V]."""

    step: np.ndarray
    loss: np.ndarray


class Start(NamedTuple):
    """The beginning of an attempt; of a line of an earlier version, the layout is empty."""

    # The step before its first: 0, or that of the checkpoint.
    step: int
    # Seconds since the epoch, at the end of its first step; NaN if unknown.
    time: float
    # Megatron's names, such as tensor_model_parallel_size, and world_size.
    layout: dict[str, Any]


@dataclass(frozen=True)
class Series:
    """A run over its N distinct steps, in ascending order; of a repeated step, the last execution counts.

    All arrays are [N], float64 unless stated; NaN where metrics.jsonl has no number.
    """

    # int64, from 1.
    step: np.ndarray
    # Nats per token.
    loss: np.ndarray
    # Since the run's beginning, after the step.
    tokens: np.ndarray
    # Model FLOPs of all ranks since the first step in metrics.jsonl, after the step; repeated steps count once.
    flops: np.ndarray
    # Mean since the last logged step, of all ranks.
    tokens_per_second: np.ndarray
    # Of the step itself, without validations and saves.
    seconds: np.ndarray
    grad_norm: np.ndarray
    learning_rate: np.ndarray
    # At the end of the step, in seconds since the epoch.
    time: np.ndarray
    # int64: the index in `starts` of the attempt that executed the step.
    attempt: np.ndarray
    # By the name of the set as in metrics.jsonl, such as "validation", "validation-code" or "test".
    validation: dict[str, Losses] = field(default_factory=dict)
    # Every attempt that executed a step, in the order of time.
    starts: list[Start] = field(default_factory=list)


def read_series(run: str | Path) -> Series:
    """The series of a run folder; empty if it has no metrics.jsonl, as before the first step.

    The run may be training meanwhile. Attempts of earlier versions are known only where they went back to an earlier
    step.
    """
    rows, starts = array("d"), []
    validation: dict[str, dict[int, float]] = {}
    begun: MetricsLine | None = None
    last = -1
    for line in each_line(Path(run) / "metrics.jsonl"):
        step = line.get("iteration")
        if not isinstance(step, int):
            continue
        if "start" in line:
            begun = line
        elif "grad_norm" in line:
            if begun is not None or step <= last or not starts:
                starts.append(_start(begun, line))
            begun, last = None, step
            rows.extend(
                (step, len(starts) - 1, _step_flops(line), *(_number(line.get(key)) for key in _FIELDS.values()))
            )
        else:
            for name, loss in _losses(line):
                validation.setdefault(name, {})[step] = loss
    return _series(np.frombuffer(rows).reshape(-1, len(_COLUMNS)), validation, starts)


def _series(rows: np.ndarray, validation: dict[str, dict[int, float]], starts: list[Start]) -> Series:
    # Reversed, so that unique() finds the last row of a step.
    _, index = np.unique(rows[::-1, 0], return_index=True)
    columns = dict(zip(_COLUMNS, rows[::-1][index].T, strict=True))
    of_steps = columns.pop("step_flops")
    columns["flops"] = np.nancumsum(of_steps) if np.isfinite(of_steps).any() else of_steps
    whole = {name: columns.pop(name).astype(np.int64) for name in ("step", "attempt")}
    losses = {
        name: Losses(np.array(sorted(of_set), np.int64), np.array([of_set[step] for step in sorted(of_set)]))
        for name, of_set in validation.items()
    }
    return Series(**whole, **columns, validation=losses, starts=starts)


def _start(begun: MetricsLine | None, first: MetricsLine) -> Start:
    """An attempt's start, from the line that says so, if any, and from its first step."""
    found = begun["start"] if begun is not None else {}
    return Start(first["iteration"] - 1, _number(first.get("time")), found if isinstance(found, dict) else {})


def _step_flops(line: MetricsLine) -> float:
    """Earlier versions wrote only the rate, and still earlier ones no seconds."""
    if "step_flops" in line:
        return _number(line["step_flops"])
    rate = _number(line.get("model_tflops_per_second_per_rank")) * 1e12
    return rate * _number(line.get("step_seconds")) * _number(line.get("world_size", 1))


def _losses(line: MetricsLine) -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if key.endswith(" lm loss"):
            yield key.removesuffix(" lm loss"), _number(value)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
