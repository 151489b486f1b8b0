"""txssm eval states: the norms of checkpoints' recurrent states over position, side by side."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from megatron_txssm.checkpoint.saved_model import find_checkpoints, recipe_beside
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.states import RESULTS, evaluate_states
from megatron_txssm.files import write_results
from megatron_txssm.reporting.plot import write_figure
from megatron_txssm.slurm.environment import is_worker
from megatron_txssm.terminal import print_table

PICTURE = "states.png"
# Positions in a table, and groups of layers: the first, the middle and the last third.
_COLUMNS, _GROUPS = 6, 3

# The states.json of a checkpoint, and the length at which it was trained.
type States = Mapping[str, Any]


def compare_states(
    runs: Sequence[Path],
    output: Path | None = None,
    *,
    length: int | None = None,
    samples: int = 8,
    every: int = 256,
    step: int | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """Measure the states of runs' checkpoints on the same samples, and show them; returns the exit code.

    output: gets states.json, states.png and a folder for each run (None, for one run: RUN/evaluation/states_N). length:
    None: four times the longest training's. The rest is as in `evaluation.states.evaluate_states`.
    """
    options = {"samples": samples, "every": every, "step": step, "overrides": overrides}
    if is_worker():
        if output is None or length is None or len(runs) != 1:
            raise UserError("txssm eval states starts a process of its own; run it without srun or torchrun")
        return evaluate_states(runs[0], output, length=length, **options)
    trained = [recipe_beside(find_checkpoints(run)).training.seq_length for run in runs]
    length = 4 * max(trained) if length is None else length
    if output is None:
        if len(runs) > 1:
            raise UserError("state --output FOLDER for the results of several checkpoints")
        output = runs[0] / "evaluation" / f"states_{length}"
    found: dict[str, States] = {}
    for run, length_trained in zip(runs, trained, strict=True):
        name = next(name for name in _names(run) if name not in found)
        print(f"{name}:", flush=True)
        if code := evaluate_states(run, output / name, length=length, **options):
            return code
        found[name] = json.loads((output / name / RESULTS).read_bytes()) | {"trained_length": length_trained}
    write_results(output / RESULTS, {"length": length, "every": every, "checkpoints": {**found}})
    print_states(found)
    plot_states(found, output / PICTURE)
    print(f"{output / RESULTS}, {output / PICTURE}")
    return 0


def _names(run: Path) -> Iterator[str]:
    """The run's name, then numbered ones, for runs of the same name."""
    path = Path(os.path.abspath(run))
    name = path.parent.name if path.name == "checkpoints" else path.name
    return (name if number == 1 else f"{name}_{number}" for number in count(1))


def print_states(found: Mapping[str, States]) -> None:
    """A table of the mean norms at a few positions, by group of layers."""
    positions = next(iter(found.values()))["positions"]
    shown = sorted({min(range(len(positions)), key=lambda i: abs(positions[i] - at)) for at in _halvings(positions)})
    rows = [
        (
            name,
            f"{group[0]['layer']} - {group[-1]['layer']}",
            *(_figure(curve[index]) for index in shown),
            _figure(max(largest_norms(group))),
            f"{np.mean([_number(layer['surviving_share']) for layer in group]):.3f}",
        )
        for name, states in found.items()
        for group in groups(states["layers"])
        for curve in [mean_norms(group)]
    ]
    columns = (f">at {positions[index]:,}" for index in shown)
    print_table(("checkpoint", "layers", *columns, ">largest", f">left after {positions[0]:,}"), rows)
    print(
        "Frobenius norm of a head's state, mean over layers, heads and samples; largest: of any head, sample and "
        f"position.\nleft after {positions[0]:,}: the share of a state that decay leaves after so many tokens, mean."
    )


def groups(layers: Sequence[Any]) -> list[list[Any]]:
    """The layers in up to three groups, from the first to the last."""
    return [list(group) for group in np.array_split(np.array(layers, object), min(_GROUPS, len(layers)))]


def mean_norms(layers: Sequence[Any]) -> list[float]:
    """At each position, over the layers."""
    return np.mean([[_number(value) for value in layer["mean"]] for layer in layers], axis=0).tolist()


def largest_norms(layers: Sequence[Any]) -> list[float]:
    """At each position, over the layers."""
    return np.max([[_number(value) for value in layer["largest"]] for layer in layers], axis=0).tolist()


def _halvings(positions: Sequence[int]) -> list[float]:
    """The last position, its half, and so on."""
    return [positions[-1] / 2**power for power in range(_COLUMNS)]


def _number(value: float | None) -> float:
    """None is what JSON has instead of infinity and NaN."""
    return math.inf if value is None else value


def _figure(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def plot_states(found: Mapping[str, States], picture: Path) -> None:
    """Mean norms over position: a panel for each checkpoint, a curve for each layer; dashed: its training's length."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.0 + 3.6 * len(found), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, states) in zip(all_axes, found.items(), strict=True):
        layers = states["layers"]
        colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(layers)))
        for colour, layer in zip(colours, layers, strict=True):
            means = np.array([math.nan if value is None else value for value in layer["mean"]])
            axes.plot(states["positions"], means, color=colour, linewidth=1.2, label=f"layer {layer['layer']}")
        axes.axvline(states["trained_length"], color="0.6", linestyle="--", linewidth=0.8)
        axes.set(yscale="log", xlabel="position (tokens)")
        axes.set_title(name, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend([handles[0], handles[-1]], [labels[0], labels[-1]], frameon=False, fontsize=8)
    all_axes[0].set_ylabel("norm of a head's state, mean")
    write_figure(figure, picture)
