"""How a recipe scales: the best layout on several numbers of GPUs, with its batch (strong) or one that grows (weak)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_txssm.architecture.gpus import GIB
from megatron_txssm.errors import UserError
from megatron_txssm.planning.ranking import Plan, rank_layouts
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.terminal import print_table

STRONG, WEAK = "strong", "weak"


@dataclass(frozen=True)
class Point:
    """The best plan on `gpus` GPUs; None if no layout is legal and fits."""

    gpus: int
    # Samples.
    batch: int
    plan: Plan | None


def sweep(
    recipe: Recipe, cluster: Cluster, limit: float, counts: Sequence[int], fixed: Mapping[str, Any]
) -> dict[str, list[Point]]:
    """Strong scaling: the recipe's batch on every number of GPUs; weak: as many samples a GPU as on the first one."""
    each = max(1, recipe.global_batch_size // counts[0])
    return {
        STRONG: [_point(recipe, cluster, limit, count, fixed) for count in counts],
        WEAK: [_point(_with_batch(recipe, each * count), cluster, limit, count, fixed) for count in counts],
    }


def _with_batch(recipe: Recipe, samples: int) -> Recipe:
    return changed(recipe, {"training.global_batch_tokens": samples * recipe.training.seq_length})


def _point(recipe: Recipe, cluster: Cluster, limit: float, gpus: int, fixed: Mapping[str, Any]) -> Point:
    ranking = rank_layouts(recipe, gpus, cluster, limit, fixed)
    return Point(gpus, recipe.global_batch_size, ranking.best)


def show_sweep(
    recipe: Recipe,
    cluster: Cluster,
    limit: float,
    counts: Sequence[int],
    fixed: Mapping[str, Any],
    plot: Path | None = None,
) -> int:
    """Print both tables, and draw them to `plot`; returns the exit code, 1 if nothing fits on any number of GPUs."""
    found = sweep(recipe, cluster, limit, counts, fixed)
    for kind, points in found.items():
        about = "the recipe's batch" if kind == STRONG else "the batch grows with the GPUs"
        print(f"{kind} scaling of {recipe.name} on {cluster.gpu.name}: {about}")
        columns = (">GPUs", ">samples", ">tokens/s", ">of linear", ">MFU", ">GiB", "layout")
        print_table(columns, [_row(point, points) for point in points])
        print()
    if plot is not None:
        draw(recipe, found, plot)
        print(f"wrote {plot}")
    return 0 if any(point.plan for points in found.values() for point in points) else 1


def _row(point: Point, points: Sequence[Point]) -> tuple[str, ...]:
    if point.plan is None:
        return (f"{point.gpus:,}", f"{point.batch:,}", "", "", "", "", "no legal layout fits")
    return (
        f"{point.gpus:,}",
        f"{point.batch:,}",
        f"{point.plan.tokens_per_second:,.0f}",
        f"{_efficiency(point, points):.0%}",
        f"{point.plan.mfu:.1%}",
        f"{point.plan.memory.peak / GIB:.1f}",
        point.plan.layout.name,
    )


def _efficiency(point: Point, points: Sequence[Point]) -> float:
    """Tokens/s of a GPU relative to those of the first number that has a plan."""
    first = next(point for point in points if point.plan is not None)
    assert point.plan is not None and first.plan is not None
    return (point.plan.tokens_per_second / point.gpus) / (first.plan.tokens_per_second / first.gpus)


def draw(recipe: Recipe, found: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Tokens/s over GPUs, both logarithmic, beside linear scaling."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for kind, points in found.items():
        planned = [(point.gpus, point.plan.tokens_per_second) for point in points if point.plan is not None]
        if planned:
            axes.plot(*zip(*planned, strict=True), marker="o", label=kind)
            first, speed = planned[0]
            axes.plot([first, planned[-1][0]], [speed, speed * planned[-1][0] / first], ":", color="gray")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s", title=recipe.name)
    axes.legend()
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path} cannot be written: {error}") from None
    finally:
        pyplot.close(figure)
