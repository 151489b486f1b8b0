"""What a benchmark's measurements show: medians, speed-ups beside ratios of FLOPs, as tables, JSON and a picture."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_txssm.bench.models import (
    DECODING,
    ENTRANTS,
    PARTS,
    PRESETS,
    REFERENCE,
    TRAINING,
    model_flops,
    recipe_of,
)
from megatron_txssm.bench.results import Results
from megatron_txssm.recipe.paper import FIGURE_4
from megatron_txssm.reporting.plot import COLOURS, write_figure
from megatron_txssm.terminal import print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "results.png"
# Bounds over the turns.
Range = tuple[float, float]
_HEADINGS = {
    "training": "training: tokens/s of a step, forward, backward and optimizer",
    "prefill": "inference, prefill: tokens/s of reading a text, one text at a time",
    "decoding": "inference, decoding: tokens/s after so many tokens, one text at a time",
}
NOTES = """
tokens/s: medians. speed-up: tokens/s of transxssm divided by the model's. turns: lowest and highest of a turn's.
A speed-up above that by FLOPs is more than the models' arithmetic explains. llama3_materialised has as many FLOPs as
llama3, whose attention is fused. Decoding is bound by the bytes of weights and cache that each token reads.
The paper's {training}x in training and {inference}x in inference over Llama 3 (1.3B, 4096 tokens) are against slow
attention, as FLOPs alone give {flops:.2f}x there: compare them with llama3_materialised."""


@dataclass(frozen=True)
class Row:
    """A model at a length: medians over all timed steps; ranges of the medians of the turns.

    Attributes:
        memory_bytes: the peak of the process or GPU; in decoding, the cache
        speedup: tokens/s of TransXSSM divided by this model's; over the turns, each compared within itself
        by_flops, by_bytes: this model's FLOPs, and bytes of weights and cache (decoding), divided by TransXSSM's
    """

    part: str
    length: int
    model: str
    tokens_per_second: float
    turns: Range
    memory_bytes: int
    speedup: float | None
    speedup_turns: Range | None
    by_flops: float | None
    by_bytes: float | None


@dataclass(frozen=True)
class _Speed:
    """All turns of a model at a length."""

    by_turn: dict[int, float]
    median: float
    figures: dict[str, Any]

    @classmethod
    def of(cls, turns: dict[int, dict[str, Any]]) -> "_Speed":
        speeds = {turn: speed(found) for turn, found in turns.items()}
        some = next(iter(turns.values()))
        pooled = [second for found in turns.values() for second in found["seconds"]]
        memory = max(found.get("peak_memory_bytes", found.get("cache_bytes", 0)) for found in turns.values())
        return cls(speeds, speed(some | {"seconds": pooled}), some | {"memory_bytes": memory})


def speed(figures: dict[str, Any]) -> float:
    """Tokens per second of a measurement, by the median of its times."""
    return figures["tokens"] / statistics.median(figures["seconds"])


def summarize(results: Results) -> list[Row]:
    """Rows by part, length and model, of what has been measured."""
    rows: list[Row] = []
    for part in PARTS:
        turns: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
        for key, figures in results.of(part):
            if "error" not in figures:
                turns.setdefault((key.length, key.model), {})[key.turn] = figures
        speeds = {place: _Speed.of(found) for place, found in turns.items()}
        for length, model in sorted(speeds, key=lambda place: (place[0], [*ENTRANTS].index(place[1]))):
            rows.append(_row(part, length, model, speeds[length, model], speeds.get((length, REFERENCE))))
    return rows


def _row(part: str, length: int, model: str, speed: _Speed, ours: _Speed | None) -> Row:
    speedup = turns = by_flops = by_bytes = None
    if ours is not None and model != REFERENCE:
        speedup = ours.median / speed.median
        both = ours.by_turn.keys() & speed.by_turn.keys()
        turns = _range([ours.by_turn[turn] / speed.by_turn[turn] for turn in both]) if both else None
        by_flops = speed.figures["flops_per_token"] / ours.figures["flops_per_token"]
        by_bytes = _bytes(speed) / _bytes(ours) if part == DECODING else None
    memory = speed.figures["memory_bytes"]
    own = _range([*speed.by_turn.values()])
    return Row(part, length, model, speed.median, own, memory, speedup, turns, by_flops, by_bytes)


def _bytes(speed: _Speed) -> int:
    return speed.figures["weight_bytes"] + speed.figures["cache_bytes"]


def _range(values: Sequence[float]) -> Range:
    return min(values), max(values)


def show(results: Results) -> None:
    """Print the tables; write the summary and the picture beside the measurements."""
    rows = summarize(results)
    for part in PARTS:
        of_part = [row for row in rows if row.part == part]
        if of_part:
            print(f"\n{_HEADINGS[part]}")
            print_table(columns(part), [cells(row) for row in of_part])
    _print_notes(results, rows)
    results.add({}, summary=[asdict(row) for row in rows])
    _plot(results.file.with_name(PICTURE), rows, _title(results))
    print(f"{results.file}, {results.file.with_name(PICTURE)}")


def columns(part: str) -> tuple[str, ...]:
    memory = ">cache MiB" if part == DECODING else ">peak GiB"
    by_bytes = (">by bytes",) if part == DECODING else ()
    return (">tokens", "model", ">tokens/s", ">turns", memory, ">speed-up", ">turns", ">by FLOPs", *by_bytes)


def cells(row: Row) -> tuple[str, ...]:
    memory = f"{row.memory_bytes / 2**20:.1f}" if row.part == DECODING else f"{row.memory_bytes / 2**30:.2f}"
    own = rate(row.tokens_per_second), _ranged(row.turns, rate), memory
    ratios = _factor(row.speedup), _ranged(row.speedup_turns, "{:.2f}".format), _factor(row.by_flops)
    by_bytes = (_factor(row.by_bytes),) if row.part == DECODING else ()
    return str(row.length), row.model, *own, *ratios, *by_bytes


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _ranged(bounds: Range | None, text: Callable[[float], str]) -> str:
    return "" if bounds is None else "-".join(map(text, bounds))


def rate(tokens_per_second: float) -> str:
    """Three digits, and all those before the point."""
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 99.5 else f"{tokens_per_second:.3g}"


def _print_notes(results: Results, rows: Sequence[Row]) -> None:
    print(NOTES.format(**FIGURE_4, flops=_papers_ratio_of_flops()))
    for part in PARTS:
        for key, figures in results.of(part):
            if "error" in figures:
                print(f"not measured: {key}: {figures['error']}")


def _papers_ratio_of_flops() -> float:
    """Of Llama 3's to TransXSSM's, where the paper gives numbers."""
    flops = [model_flops(recipe_of(model, PRESETS["1.3b"], 4096), TRAINING, 4096) for model in ("llama3", "transxssm")]
    return flops[0] / flops[1]


def _title(results: Results) -> str:
    return f"{results.about['settings']['preset']}, {results.about['machine']['device']}"


def _plot(picture: Path, rows: Sequence[Row], title: str) -> None:
    """Throughput over length, a panel for each part; bars from the slowest to the fastest turn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [part for part in PARTS if any(row.part == part for row in rows)]
    if not parts:
        return
    figure = Figure(figsize=(4.6 * len(parts), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        _draw(axes, part, [row for row in rows if row.part == part])
    figure.suptitle(title, fontsize=11)
    write_figure(figure, picture)


def _draw(axes: "Axes", part: str, rows: Sequence[Row]) -> None:
    for colour, model in zip(COLOURS, ENTRANTS, strict=False):
        of_model = [row for row in rows if row.model == model]
        if of_model:
            speeds = [row.tokens_per_second for row in of_model]
            # A median over all steps may lie outside of those of the turns.
            below = [max(0.0, row.tokens_per_second - row.turns[0]) for row in of_model]
            above = [max(0.0, row.turns[1] - row.tokens_per_second) for row in of_model]
            lengths = [row.length for row in of_model]
            axes.errorbar(lengths, speeds, yerr=(below, above), marker="o", color=colour, capsize=3, label=model)
    axes.set_xscale("log", base=2)
    lengths = sorted({row.length for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set(title=part, xlabel="tokens", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
