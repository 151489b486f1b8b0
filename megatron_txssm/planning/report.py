"""Prints plans: the best layouts, memory and traffic of the best one by pipeline rank, and near misses."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_txssm.architecture.gpus import GIB
from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.planning import finalists
from megatron_txssm.planning.layouts import Layout
from megatron_txssm.planning.nearest import Answer
from megatron_txssm.planning.ranking import Plan, Ranking, estimated_usage
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.planning.share import pipeline_stages
from megatron_txssm.planning.usage import Usage
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.terminal import print_table

DAY, HOUR = 86_400, 3_600
NEAR_MISSES = 3


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    recipe: Recipe
    cluster: Cluster
    # Tokens of the whole training.
    tokens: int
    # Plans to show.
    top: int


def show_answer(asked: Request, found: Answer, dry_runs: int) -> Plan | None:
    """Print everything about an answer, with dry runs of the best `dry_runs` layouts.

    Returns the best layout that fits, also by its dry run; None if there is none.
    """
    recipe, cluster, ranking = asked.recipe, asked.cluster, found.ranking
    parameters = count_parameters(recipe.sizes).total
    print(f"{recipe.name}: {parameters / 1e6:,.0f}M parameters, {recipe.training.seq_length:,} tokens a sample,")
    print(f"{recipe.global_batch_size:,} samples a step, {asked.tokens / 1e9:,.1f}B tokens in all;")
    print(f"{found.gpus:,} {cluster.gpu.name} in nodes of {cluster.per_node}, {ranking.limit / GIB:.1f} GiB each")
    plans = ranking.fitting[: asked.top]
    if plans:
        print(
            "\n1 layout fits:" if len(ranking.fitting) == 1 else f"\n{len(ranking.fitting):,} layouts fit; the fastest:"
        )
    elif ranking.smallest is not None:
        print("\nno layout fits; the one that needs the least memory:")
        plans = [ranking.smallest]
    else:
        return None
    print_table(("layout", ">GiB", ">tokens/s", ">MFU", ">days", ">GPU-hours"), (_row(asked, plan) for plan in plans))
    runs = finalists.dry_runs(ranking.fitting[: min(dry_runs, asked.top)])
    best = show_dry_runs(runs, ranking.limit) if runs else ranking.best
    shown = best or plans[0]
    show_plan(shown, next((run.usages for run in runs if run.plan is shown), {}))
    show_near_misses(ranking, plans[0])
    return best


def show_dry_runs(runs: Sequence[finalists.DryRun], limit: float) -> Plan | None:
    """Print the peaks of dry runs beside the formulas'; returns the first plan that fits, None if none does."""
    print("\ndry runs, the real model on fake tensors, GiB of the largest stage:")
    rows: list[tuple[str, ...]] = []
    fits: list[Plan] = []
    for run in runs:
        formula, peak = run.plan.memory.peak / GIB, run.peak
        if peak is None:
            rows.append((run.plan.layout.name, f"{formula:.1f}", "", f"failed: {run.failure}"))
            continue
        if peak <= limit:
            fits.append(run.plan)
        said = "fits" if peak <= limit else f"{(peak - limit) / GIB:.2f} GiB too large"
        rows.append((run.plan.layout.name, f"{formula:.1f}", f"{peak / GIB:.2f}", said))
    print_table(("layout", ">by formula", ">dry run", ""), rows)
    return fits[0] if fits else None


def _row(asked: Request, plan: Plan) -> tuple[str, ...]:
    seconds = asked.tokens / plan.tokens_per_second
    return (
        plan.layout.name,
        f"{plan.memory.peak / GIB:.1f}",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.mfu:.1%}",
        f"{seconds / DAY:,.2f}",
        f"{seconds / HOUR * plan.layout.gpus:,.0f}",
    )


def show_plan(plan: Plan, dry_run: Mapping[int, Usage]) -> None:
    """Print a plan's step by what its time goes to, its memory by kind and its traffic by group, for each stage.

    dry_run: usages of stages that were tried; the formulas give those of the others.
    """
    time = plan.time
    parts = {
        "kernels": time.compute,
        "waiting for model parallelism": time.exchange,
        "pipeline bubble": time.bubble,
        "waiting for data parallelism": time.data,
        "optimizer": time.optimizer,
        "CPU between kernels": time.host,
    }
    print(f"\n{plan.layout.name}: {time.total:.3f} s a step")
    for name, seconds in parts.items():
        if seconds:
            print(f"  {name:30} {seconds / time.total:6.1%}")
    layout = plan.layout
    kinds = pipeline_stages(plan.recipe, layout.pipeline, layout.virtual).kinds
    stages = {_stages(kind.first, kind.count, layout.pipeline): kind.first for kind in kinds}
    recipe = layout.of(plan.recipe)
    usages = {name: dry_run.get(stage) or estimated_usage(recipe, layout.gpus, stage) for name, stage in stages.items()}
    print(f"\nGiB a GPU, {'by dry run' if dry_run else 'by formula'}:")
    _show_memory(usages)
    print("\nGiB a step and GPU, of each collective the largest tensor:")
    _show_traffic(usages)


def _stages(first: int, count: int, pipeline: int) -> str:
    """Such as `1 of 8, 5 alike`: the pipeline's stage that is shown, and how many later ones hold the same."""
    if pipeline == 1:
        return "all"
    return f"{first} of {pipeline}" + (f", {count - 1} alike" if count > 1 else "")


def _show_memory(usages: Mapping[str, Usage]) -> None:
    rows = (
        (name, *(f"{size / GIB:.2f}" for size in (u.weights, u.gradients, u.optimizer, u.activations, u.peak)))
        for name, u in usages.items()
    )
    print_table(("stage", ">weights", ">gradients", ">optimizer", ">activations", ">peak"), rows)


def _show_traffic(usages: Mapping[str, Usage]) -> None:
    groups = dict.fromkeys(group for usage in usages.values() for group in usage.traffic)
    if not groups:
        print("none")
        return
    rows = (
        (group, collective, *(f"{usage.traffic.get((collective, group), 0) / GIB:.3f}" for usage in usages.values()))
        for collective, group in sorted(groups, key=lambda key: (key[1], key[0]))
    )
    print_table(("group", "collective", *(f">{name}" for name in usages)), rows)


def show_near_misses(ranking: Ranking, best: Plan) -> None:
    """Print faster layouts that do not fit, and the illegal ones that are most like the best."""
    faster = [plan for plan in ranking.too_large if plan.time.total < best.time.total]
    rows = [
        (plan.layout.name, f"{(plan.memory.peak - ranking.limit) / GIB:.2f} GiB too large, {_gain(plan, best)}")
        for plan in sorted(faster, key=lambda plan: plan.memory.peak)[:NEAR_MISSES]
    ]
    rows += _illegal(ranking, best.layout)
    if rows:
        print("\nnear misses:")
        print_table(("layout", "why not"), rows)


def _gain(plan: Plan, best: Plan) -> str:
    return f"{plan.tokens_per_second / best.tokens_per_second - 1:.1%} faster"


def _illegal(ranking: Ranking, best: Layout) -> Iterable[tuple[str, str]]:
    """The illegal layouts that differ least from the best, each reason once."""
    reasons: dict[str, str] = {}
    for refused in sorted(ranking.refused, key=lambda refused: _distance(refused.layout, best)):
        # The same reason with other numbers is no news.
        kind = "".join(filter(str.isalpha, refused.reason))
        if kind not in reasons and len(reasons) < NEAR_MISSES:
            reasons[kind] = ""
            yield refused.layout.name, refused.reason


def _distance(layout: Layout, best: Layout) -> int:
    """In how many sizes two layouts differ."""
    axes = ("tensor", "pipeline", "virtual", "context", "state_context", "expert", "micro_batch")
    return sum(getattr(layout, axis) != getattr(best, axis) for axis in axes)
