"""Dry runs of the best layouts: the formulas rank them, the real model on fake tensors says what they need."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron_txssm.errors import UserError
from megatron_txssm.planning.dry_run.run import FOR_A_STEP, DryRunFailed, RankOf, run_ranks, usage_of
from megatron_txssm.planning.ranking import Plan
from megatron_txssm.planning.share import pipeline_stages
from megatron_txssm.planning.usage import Usage
from megatron_txssm.recipe.changes import changed
from megatron_txssm.terminal import doing

# Processes at once; each takes a core, and up to a few GiB.
AT_ONCE = 4


@dataclass(frozen=True)
class DryRun:
    """A finalist's usage by pipeline rank, of one rank of each stage that was tried; or why its dry run failed."""

    plan: Plan
    usages: dict[int, Usage]
    failure: str = ""

    @property
    def peak(self) -> int | None:
        """Bytes of the worst stage that was tried; None if it failed."""
        return max((usage.peak for usage in self.usages.values()), default=None)


def dry_runs(plans: Sequence[Plan]) -> list[DryRun]:
    """Dry runs of these plans' layouts, some at once, in the plans' order.

    Each kind of stage of the first, and of the others the stage that needs most by formula.
    """
    if not plans:
        return []
    at_once = min(AT_ONCE, len(os.sched_getaffinity(0)), len(plans))
    with doing(f"dry runs of {len(plans)} layouts"), ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(_dry_run, plans, [True, *[False] * (len(plans) - 1)]))


def _dry_run(plan: Plan, all_stages: bool) -> DryRun:
    layout = plan.layout
    recipe = changed(layout.of(plan.recipe), FOR_A_STEP)
    # Ranks of one pipeline stage are consecutive: pipeline parallelism is Megatron's outermost.
    stride = layout.gpus // layout.pipeline
    kinds = pipeline_stages(plan.recipe, layout.pipeline, layout.virtual).kinds
    stages = [kind.first for kind in kinds] if all_stages else [plan.worst]
    try:
        found = run_ranks([RankOf(recipe, layout.gpus, stage * stride) for stage in stages], kernels="gpu")
    except (UserError, DryRunFailed) as error:
        return DryRun(plan, {}, str(error))
    if failures := [result["failed"] for result in found if "failed" in result]:
        return DryRun(plan, {}, failures[0])
    return DryRun(plan, {stage: usage_of(result["usage"]) for stage, result in zip(stages, found, strict=True)})
