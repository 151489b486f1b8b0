"""Draws curves of runs, one panel per quantity, all runs in each."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_txssm.errors import UserError
from megatron_txssm.files import write_file_atomically
from megatron_txssm.reporting.charts import running_mean
from megatron_txssm.reporting.series import Series, read_series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What can be drawn -> a field of Series, and the axis's label.
PANELS = {
    "loss": ("loss", "cross-entropy (nats/token)"),
    "validation": ("", "validation loss (nats/token)"),
    "throughput": ("tokens_per_second", "tokens/s"),
    "gradient": ("grad_norm", "gradient norm"),
    "learning_rate": ("learning_rate", "learning rate"),
}
# What it is drawn over -> a field of Series, and the axis's label.
OVER = {
    "steps": ("step", "optimizer steps"),
    "tokens": ("tokens", "tokens"),
    "flops": ("flops", "model FLOPs"),
}
FORMATS = (".png", ".svg", ".pdf")
# From this many steps on, a curve is drawn faintly, with its running mean over 1/40 of them.
SMOOTH_FROM_STEPS, SMOOTHING_WINDOWS = 80, 40
# Points of a curve; more cannot be seen, and make a large SVG.
MOST_POINTS = 2000
# Validations with a marker each.
MOST_MARKERS = 40

COLOURS = ("#2a6fbb", "#d1495b", "#2e8b57", "#c77d00", "#6f4fa0", "#5b5b5b", "#12a5b0", "#a05195")
VALIDATION_COLOUR = "#d1495b"
BASELINE_COLOURS = ("#5b5b5b", "#2e8b57", "#8a5a00", "#6f4fa0")


def plot_runs(
    runs: Sequence[str | Path],
    picture: str | Path,
    *,
    panels: Sequence[str] = ("loss",),
    over: str = "steps",
    smooth: int | None = None,
    baselines: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path:
    """Draw curves of run folders into a PNG, SVG or PDF file; returns its path.

    Args:
        picture: its name ends in one of FORMATS; the same metrics give the same bytes
        panels: names in PANELS, drawn one below the other
        over: a name in OVER
        smooth: steps of the running mean; 1: none; None: a fortieth of each run, from 80 steps on
        baselines: name -> nats per token, horizontal lines in the loss panel

    UserError for a wrong name, a run without steps, or a picture that cannot be written.
    """
    path = Path(picture)
    _check(path, panels, over, smooth)
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise UserError("a run is named twice; name each once")
    found = {name: read_series(run) for name, run in zip(_names(runs), runs, strict=True)}
    for run, series in zip(runs, found.values(), strict=True):
        if not len(series.step) and not series.validation:
            raise UserError(f"{run}: its metrics.jsonl has no step yet; name the folder of a run that has trained")
        if over == "flops" and not np.isfinite(series.flops).any():
            raise UserError(f"{run}: its metrics.jsonl has no FLOPs, being of an earlier version; use --over tokens")
    # Figure without pyplot: no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.8 + 3.0 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        shown = []
        for index, (name, series) in enumerate(found.items()):
            colour = COLOURS[index % len(COLOURS)]
            shown += _draw(axes, panel, over, series, smooth, name if len(found) > 1 else "", colour)
        if panel == "loss":
            shown += _draw_baselines(axes, baselines or {})
        _finish(axes, PANELS[panel][1], over, shown)
    all_axes[-1].set_xlabel(OVER[over][1])
    if title:
        all_axes[0].set_title(title, loc="left", fontsize=11)
    write_figure(figure, path)
    return path


def _check(picture: Path, panels: Sequence[str], over: str, smooth: int | None) -> None:
    for name, value, known in (("--over", over, OVER), *(("--panel", panel, PANELS) for panel in panels)):
        if value not in known:
            raise UserError(f"{name} {value}: use one of {', '.join(known)}")
    if picture.suffix not in FORMATS:
        raise UserError(f"{picture}: a picture's name ends in {', '.join(FORMATS)}")
    if smooth is not None and smooth < 1:
        raise UserError(f"--smooth {smooth} must be at least 1, which is no smoothing")


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The runs' folder names; their paths if two have the same name."""
    short = [Path(run).resolve().name for run in runs]
    return short if len(set(short)) == len(short) else list(map(str, runs))


def _draw(
    axes: "Axes", panel: str, over: str, series: Series, smooth: int | None, name: str, colour: str
) -> list[float]:
    """One run's curves; returns values that the panel must show. `name`: empty if it is the only run."""
    shown = []
    x = getattr(series, OVER[over][0]).astype(float)
    values = np.full(len(x), np.nan) if panel == "validation" else getattr(series, PANELS[panel][0])
    if np.isfinite(values).any():
        # A schedule is smooth.
        label = name or ("training" if panel == "loss" else "")
        shown += _draw_steps(axes, x, values, 1 if panel == "learning_rate" else smooth, label, colour)
    if panel in ("loss", "validation"):
        shown += _draw_validation(axes, series, x, name, colour if name or panel != "loss" else VALIDATION_COLOUR)
    return shown


def _draw_steps(
    axes: "Axes", x: np.ndarray, values: np.ndarray, smooth: int | None, label: str, colour: str
) -> list[float]:
    shown = [np.nanmin(values), np.nanmax(values)]
    window = smooth or (len(x) // SMOOTHING_WINDOWS if len(x) >= SMOOTH_FROM_STEPS else 1)
    if window > 1:
        # Odd, so that the window is symmetric.
        window |= 1
        axes.plot(*_extremes(x, values), color=colour, alpha=0.25, linewidth=0.8)
        # The first steps' losses and single spikes may leave the panel, so that the rest can be seen.
        shown = list(np.nanpercentile(values, (0.5, 99.5)))
        values = running_mean(values, window)
        label = f"{label}{', ' if label else ''}mean over {window} steps"
    axes.plot(*_extremes(x, values), color=colour, linewidth=1.6, label=label)
    return shown


def _draw_validation(axes: "Axes", series: Series, x: np.ndarray, name: str, colour: str) -> list[float]:
    for index, (of_set, (steps, losses)) in enumerate(series.validation.items()):
        where = np.interp(steps, series.step, x) if len(x) else steps
        label = f"{name}{', ' if name else ''}{of_set} (last: {losses[-1]:.3f})"
        marker = "osD^v"[index % 5] if len(losses) <= MOST_MARKERS else ""
        style = {"marker": marker, "markersize": 4, "linewidth": 1.0, "linestyle": "-" if marker else ":"}
        axes.plot(where, losses, color=colour, zorder=3, label=label, **style)
    return [loss for _, losses in series.validation.values() for loss in losses]


def _draw_baselines(axes: "Axes", baselines: Mapping[str, float]) -> list[float]:
    for index, (name, value) in enumerate(baselines.items()):
        colour = BASELINE_COLOURS[index % len(BASELINE_COLOURS)]
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=f"{name}: {value:.3f}", zorder=1)
    return list(baselines.values())


def _finish(axes: "Axes", label: str, over: str, shown: list[float]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=over == "steps"))
    if over == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    finite = [value for value in shown if np.isfinite(value)]
    if finite and min(finite) < max(finite):
        margin = 0.05 * (max(finite) - min(finite))
        axes.set_ylim(min(finite) - margin, max(finite) + margin)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(frameon=False, fontsize=9)
    elif not axes.lines:
        axes.text(0.5, 0.5, "no values in metrics.jsonl", transform=axes.transAxes, ha="center", color="0.4")


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG, SVG or PDF file, by the name; the same figure gives the same bytes. UserError if that fails."""
    from matplotlib import rc_context

    content = io.BytesIO()
    # Without the library's version, the date and random ids, the same metrics give the same bytes.
    of_kind = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}, ".pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "txssm"}):
        figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=of_kind[path.suffix])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, content.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another file") from None


def _extremes(x: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve of at most MOST_POINTS: of every piece its smallest and its largest value, so that no spike is lost."""
    if len(x) <= MOST_POINTS:
        return x, values
    kept = []
    for piece in np.array_split(np.arange(len(x)), MOST_POINTS // 2):
        of_piece = values[piece]
        if np.isfinite(of_piece).any():
            kept += sorted({int(piece[np.nanargmin(of_piece)]), int(piece[np.nanargmax(of_piece)])})
    return x[kept], values[kept]
