"""txssm eval length: the loss by position in samples longer than the training's, without and with each remedy."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.evaluate import evaluate, evaluation_recipe
from megatron_txssm.files import write_results
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.reporting.plot import COLOURS, write_figure
from megatron_txssm.slurm.environment import is_worker
from megatron_txssm.terminal import print_table

RESULTS, PICTURE = "length.json", "length.png"


def evaluate_length(
    run: Path,
    *,
    seq_length: int | None = None,
    parts: int = 16,
    step: int | None = None,
    overrides: Sequence[str] = (),
    nproc: int | None = None,
    port: int | None = None,
) -> int:
    """Evaluate a run's checkpoint in samples of `seq_length` tokens, without and with each remedy; the exit code.

    Writes RUN/evaluation/length_N/length.json and length.png. seq_length: None: four times the training's. parts: in
    how many equal parts of the samples the loss is averaged. The rest is as in `evaluate.evaluate`.
    """
    if is_worker():
        raise UserError("txssm eval length starts processes of its own; run it without srun or torchrun")
    recipe = evaluation_recipe(run, overrides)
    trained = recipe.training.seq_length
    length = 4 * trained if seq_length is None else seq_length
    if length <= trained:
        raise UserError(f"--seq-length {length} is no more than the training's {trained}; state a longer one")
    if parts < 1 or length % parts:
        raise UserError(f"--parts {parts} does not divide --seq-length {length}; state a divisor of it")
    folder = run / "evaluation" / f"length_{length}"
    # A batch is as many tokens as before, or one sample.
    samples = max(1, recipe.training.global_batch_tokens // length)
    longer = [f"training.seq_length={length}", f"training.global_batch_tokens={samples * length}"]
    longer += ["training.micro_batch_size=1", "parallel.context_parallel_size=1"]
    found: dict[str, list[float]] = {}
    for name, changes in remedies(recipe, length).items():
        print(f"{name}:", flush=True)
        words = [*overrides, *changes, *longer]
        options = {"step": step, "by_position": parts, "nproc": nproc, "port": port}
        code = evaluate(run, output=folder / name.replace(" ", "_"), overrides=words, **options)
        if code != 0:
            return code
        found[name] = _read(folder / name.replace(" ", "_"))
    try:
        show(found, trained, length, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; make room, and repeat the command") from None
    return 0


def remedies(recipe: Recipe, length: int) -> dict[str, list[str]]:
    """Name -> its changes of the recipe, of those that concern its layers and that the training did not have already.

    The scaling of C is the paper's (arXiv:2506.09507, appendix A), interpolation that of arXiv:2306.15595.
    """
    model, trained = recipe.model, recipe.training.seq_length
    found: dict[str, list[str]] = {"as trained": []}
    if recipe.has_state_space and model.length_scaling_base is None:
        found["C scaled by its position"] = [f"model.length_scaling_base={trained}"]
    rotated = (recipe.has_state_space and model.position_encoding == "rope") or (
        recipe.has_attention and model.attention_position_encoding == "rope"
    )
    if rotated and model.rope_scaling == "none":
        factor = f"model.rotary_interpolation_factor={math.ceil(length / trained)}"
        found["positions interpolated"] = ["model.rope_scaling=linear", factor]
    return found


def _read(folder: Path) -> list[float]:
    """The loss of each part, of all validation sets together."""
    sets: Mapping[str, Any] = json.loads((folder / "validation.json").read_bytes())["sets"]
    weights = [each["tokens"] for each in sets.values()]
    return np.average([each["by_position"] for each in sets.values()], axis=0, weights=weights).tolist()


def show(found: Mapping[str, list[float]], trained: int, length: int, folder: Path) -> None:
    """Print the losses by position, and write them and their picture. found: remedy -> nats per token of each part."""
    parts = len(next(iter(found.values())))
    starts = [part * length // parts for part in range(parts)]
    write_results(
        folder / RESULTS, {"trained_length": trained, "length": length, "starts": starts, "loss": dict(found)}
    )
    rows = [
        (
            f"{start:,}",
            "beyond training" if start >= trained else "",
            *(f"{losses[part]:.4f}" for losses in found.values()),
        )
        for part, start in enumerate(starts)
    ]
    print_table((">from token", "", *(f">{name}" for name in found)), rows)
    _plot(found, starts, trained, folder / PICTURE)
    print(f"nats per token; {folder / RESULTS}, {folder / PICTURE}")


def _plot(found: Mapping[str, list[float]], starts: Sequence[int], trained: int, picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for colour, (name, losses) in zip(COLOURS, found.items(), strict=False):
        axes.plot(starts, losses, "o-", color=colour, markersize=3, label=name)
    axes.axvline(trained, color="0.6", linestyle="--", linewidth=0.8)
    axes.set_xlabel("position in the sample (dashed: the training's length)")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    write_figure(figure, picture)
