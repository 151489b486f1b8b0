"""The loss curve of one run as a PNG: training and validation loss, with n-gram baselines."""

import io
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.files import write_file_atomically
from megatron_txssm.metrics import values_by_step

TRAINING_KEY = "lm loss"
VALIDATION_KEY = "validation lm loss"

# From this many points on, the training loss is drawn faintly, with its running mean over 1/40 of them.
SMOOTH_FROM_POINTS = 80
SMOOTHING_WINDOWS = 40

TRAINING_COLOUR = "#2a6fbb"
VALIDATION_COLOUR = "#d1495b"
BASELINE_COLOURS = ("#5b5b5b", "#2e8b57", "#8a5a00", "#6f4fa0")


def plot_loss_curve(
    metrics_jsonl: str | Path,
    png_path: str | Path,
    *,
    baselines: dict[str, float],
    title: str | None = None,
) -> Path:
    """Draw training loss, validation loss and horizontal baselines (name -> nats per token); returns `png_path`.

    metrics_jsonl: one JSON object per line with "iteration" and "lm loss" or "validation lm loss".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    metrics = Path(metrics_jsonl)
    if not metrics.is_file():
        raise UserError(f"{metrics}: No such file; name the metrics.jsonl of a run")
    training, validation = values_by_step(metrics, TRAINING_KEY), values_by_step(metrics, VALIDATION_KEY)
    iterations, losses = list(training), list(training.values())
    validation_iterations, validation_losses = list(validation), list(validation.values())
    if not losses and not validation_losses:
        raise UserError(f'metrics file {metrics_jsonl}: has no "{TRAINING_KEY}"; let the run log a few iterations')

    # Figure without pyplot: no global state and no display.
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(losses) >= SMOOTH_FROM_POINTS:
        axes.plot(iterations, losses, color=TRAINING_COLOUR, alpha=0.3, linewidth=0.9)
        # Odd, so that the window is symmetric.
        window = max(3, len(losses) // SMOOTHING_WINDOWS | 1)
        label = f"training, mean over {window} logged steps"
        axes.plot(iterations, _running_mean(losses, window), color=TRAINING_COLOUR, linewidth=1.8, label=label)
    elif losses:
        axes.plot(iterations, losses, color=TRAINING_COLOUR, linewidth=1.8, label="training")
    if validation_losses:
        label = f"validation (last: {validation_losses[-1]:.3f})"
        style = {"color": VALIDATION_COLOUR, "marker": "o", "markersize": 5, "linewidth": 1.2, "zorder": 3}
        axes.plot(validation_iterations, validation_losses, label=label, **style)
    for index, (name, value) in enumerate(baselines.items()):
        colour = BASELINE_COLOURS[index % len(BASELINE_COLOURS)]
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=f"{name}: {value:.3f}", zorder=1)

    axes.set_xlabel("iteration (optimizer steps)")
    axes.set_ylabel("cross-entropy (nats/token)")
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)

    png = io.BytesIO()
    # Without the library's version, the same metrics give the same bytes.
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    png_path = Path(png_path)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(png_path, png.getvalue())
    return png_path


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean over a window around each point, truncated at both ends: the curve is neither shifted nor shortened."""
    half = window // 2
    means = []
    for index in range(len(values)):
        around = values[max(0, index - half) : index + half + 1]
        means.append(sum(around) / len(around))
    return means
