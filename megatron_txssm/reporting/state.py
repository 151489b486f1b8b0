"""The figures that head a report: what a run does now, how far it is and how fast."""

import math
import time
from datetime import timedelta
from pathlib import Path

import numpy as np

from megatron_txssm.holders import is_held
from megatron_txssm.metrics import metrics_tail
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.reporting.charts import short
from megatron_txssm.reporting.runs import progress, state
from megatron_txssm.reporting.series import Series
from megatron_txssm.slurm.client import Job


def state_cells(run: Path, recipe: Recipe | None, series: Series, queue: list[Job] | None) -> dict[str, str]:
    """Name -> text for a table or a tile; empty where unknown.

    recipe: None if it is not readable; queue: as in `runs.state`. UserError or OSError if a record is not readable.
    """
    now = progress(run)
    found = state(run, recipe, now.step, queue) if recipe is not None else "running" if is_held(run) else "unknown"
    losses = [known.loss[-1] for name, known in series.validation.items() if name.startswith("validation")]
    (mfu,) = [line.get("mfu") for line in metrics_tail(run / "metrics.jsonl") if "grad_norm" in line][-1:] or [None]
    left = ""
    if found == "running" and recipe is not None and now.seconds is not None:
        since = max(0.0, time.time() - (now.time or 0.0))
        left = str(timedelta(seconds=round(max(0.0, (recipe.train_iters - now.step) * now.seconds - since))))
    return {
        "state": found,
        "step": f"{now.step:,}{'' if recipe is None else f' of {recipe.train_iters:,}'}",
        "loss": _shown(now.loss, ".4f"),
        "validation": _shown(float(np.mean(losses)) if losses else None, ".4f"),
        "tokens": short(series.tokens[-1]) if len(series.tokens) and math.isfinite(series.tokens[-1]) else "",
        "tokens/s": _shown(now.tokens_per_second, ",.0f"),
        "MFU": _shown(mfu, ".1%"),
        "ETA": left,
    }


def _shown(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""
