"""What a run does now, how far it is and how fast."""

import contextlib
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.goodput import job_states
from megatron_txssm.jobs.run_jobs import who_trains
from megatron_txssm.metrics import metrics_tail
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.reporting.charts import short
from megatron_txssm.reporting.series import Series

# Steps over which speeds are taken.
_RECENT = 100


@dataclass(frozen=True)
class State:
    """A run's present state; NaN or None where it is not known."""

    name: str
    # Of its last step.
    step: int
    total_steps: int | None
    loss: float
    validation_loss: float
    tokens: float
    # Medians over the last steps.
    tokens_per_second: float
    mfu: float
    # Until the last step, validations and saves included; only while it trains.
    eta_seconds: float

    def cells(self) -> dict[str, str]:
        """Name -> text for a table or a tile; empty where unknown."""
        step = f"{self.step:,}" if self.total_steps is None else f"{self.step:,} of {self.total_steps:,}"
        return {
            "state": self.name,
            "step": step,
            "loss": _shown(self.loss, ".4f"),
            "validation": _shown(self.validation_loss, ".4f"),
            "tokens": "" if math.isnan(self.tokens) else short(self.tokens),
            "tokens/s": _shown(self.tokens_per_second, ",.0f"),
            "MFU": _shown(self.mfu, ".1%"),
            "ETA": "" if math.isnan(self.eta_seconds) else str(timedelta(seconds=round(self.eta_seconds))),
        }


def queue_states() -> dict[Path, str]:
    """Run folder -> squeue's state of its training job; empty if Slurm does not answer or is not there."""
    with contextlib.suppress(UserError):
        return job_states()
    return {}


def run_state(run: Path, recipe: Recipe | None, series: Series, job_state: str | None) -> State:
    """The state of a run. recipe: None if it is not readable; job_state: as in `queue_states`, None without a job."""
    step = int(series.step[-1]) if len(series.step) else 0
    total = None if recipe is None else recipe.train_iters
    name = _name(run, step, total, job_state)
    losses = [found.loss[-1] for name, found in series.validation.items() if name.startswith("validation")]
    tail = [line for line in metrics_tail(run / "metrics.jsonl") if "grad_norm" in line][-_RECENT:]
    left = 0 if total is None else max(0, total - step)
    return State(
        name=name,
        step=step,
        total_steps=total,
        loss=float(series.loss[-1]) if len(series.loss) else math.nan,
        validation_loss=float(np.mean(losses)) if losses else math.nan,
        tokens=float(series.tokens[-1]) if len(series.tokens) else math.nan,
        tokens_per_second=_median(series.tokens_per_second[-_RECENT:]),
        mfu=_median(np.array([line["mfu"] for line in tail if isinstance(line.get("mfu"), float)])),
        eta_seconds=left * _seconds_per_step(series) if name in ("training", "running") and total else math.nan,
    )


def _name(run: Path, step: int, total: int | None, job_state: str | None) -> str:
    if job_state is not None:
        return job_state.lower()
    if who_trains(run) is not None:
        return "training"
    if step == 0:
        return "not started"
    return "finished" if total is not None and step >= total else "stopped"


def _seconds_per_step(series: Series) -> float:
    """Of the last steps of the last attempt, with what comes between steps; NaN without two steps."""
    if not len(series.step):
        return math.nan
    recent = slice(-_RECENT, None)
    times = series.time[recent][series.attempt[recent] == series.attempt[-1]]
    mean = float(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else math.nan
    return mean if math.isfinite(mean) else _median(series.seconds[recent])


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def _shown(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
