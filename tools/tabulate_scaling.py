#!/usr/bin/env python3
"""docs/planner.md's table and picture of strong and weak scaling, by formula: `txssm plan --sweep` of several recipes.

.venv/bin/python tools/tabulate_scaling.py --plot docs/scaling.svg      # prints the table; two minutes on one core
.venv/bin/python tools/tabulate_scaling.py --recipes transxssm_7b llama3_7b --gpus 8 64
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_txssm.planning.plan import cluster_of
from megatron_txssm.planning.sweep import Point, sweep
from megatron_txssm.recipe.loader import load_recipe

RECIPES = [f"{kind}_{size}" for size in ("320m", "1.3b", "7b", "70b") for kind in ("transxssm", "llama3")]
RECIPES.append("transxssm_7b_moe")
# Of a GPU's memory, as by default in plans.
FRACTION = 0.92

type Scaling = dict[str, dict[str, list[Point]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512, 4096], metavar="N")
    parser.add_argument("--gpu", default="h100-sxm", metavar="NAME")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    cluster = cluster_of(args.gpu)
    limit = FRACTION * cluster.gpu.memory_bytes
    found = {name: sweep(load_recipe(name), cluster, limit, args.gpus, {}) for name in args.recipes}
    print_markdown(found, args.gpus)
    if args.plot is not None:
        draw(found, args.plot)


def print_markdown(found: Scaling, gpus: Sequence[int]) -> None:
    print("| recipe | scaling |", *(f"{count:,} GPUs |" for count in gpus))
    print("|---|---|" + "---|" * len(gpus))
    for name, kinds in found.items():
        for kind, points in kinds.items():
            print(f"| {name} | {kind} |", *(f"{cell(point)} |" for point in points))


def cell(point: Point) -> str:
    if point.plan is None:
        return "does not fit"
    return f"{point.plan.tokens_per_second / point.gpus:,.0f}, {point.plan.mfu:.1%}"


def draw(found: Mapping[str, Mapping[str, Sequence[Point]]], path: Path) -> None:
    """Tokens/s of a GPU over the number of GPUs: a panel for each kind of scaling, a color for each size."""
    import matplotlib

    matplotlib.use("agg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4.5), sharey=True, layout="constrained")
    sizes = list(dict.fromkeys(name.partition("_")[2] for name in found))
    for axes, kind in zip(panels, next(iter(found.values())), strict=True):
        for name, kinds in found.items():
            model, _, size = name.partition("_")
            planned = [(point.gpus, point.plan.tokens_per_second / point.gpus) for point in kinds[kind] if point.plan]
            if planned:
                style = {"color": f"C{sizes.index(size)}", "linestyle": "--" if model == "llama3" else "-"}
                axes.plot(*zip(*planned, strict=True), marker="o", markersize=3, label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel="GPUs", title=f"{kind} scaling")
    panels[0].set_ylabel("tokens/s of a GPU")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
