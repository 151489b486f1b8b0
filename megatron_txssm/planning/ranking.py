"""Ranks all layouts of a recipe on N GPUs by predicted tokens per second, among those that fit their memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_txssm.architecture.flops import flops_per_token
from megatron_txssm.planning.layouts import RECOMPUTE, Layout, Refused, candidates
from megatron_txssm.planning.memory import Memory, memory_of
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.planning.share import Share, Stages, pipeline_stages, share_of
from megatron_txssm.planning.step_time import Overlaps, StepTime, step_time
from megatron_txssm.planning.traffic import traffic_of
from megatron_txssm.planning.usage import Usage
from megatron_txssm.recipe.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """A layout with its predicted memory and time.

    Attributes:
        worst: the pipeline rank with the largest peak
        memory: that rank's
        flops: peak of the GPU for the recipe's precision, per second
    """

    recipe: Recipe
    layout: Layout
    worst: int
    memory: Memory
    time: StepTime
    flops: float

    @property
    def tokens_per_second(self) -> float:
        return self.recipe.training.global_batch_tokens / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak of bf16, as the training's log counts it."""
        training = self.recipe.training
        needed = flops_per_token(self.recipe.sizes, training.seq_length) * self.tokens_per_second
        return needed / (self.layout.gpus * self.flops)


@dataclass(frozen=True)
class Ranking:
    """All layouts: those that fit, the fastest first; those that do not, likewise; and the illegal ones."""

    fitting: list[Plan]
    too_large: list[Plan]
    refused: list[Refused]
    # Bytes that a GPU's tensors may take.
    limit: float

    @property
    def best(self) -> Plan | None:
        return self.fitting[0] if self.fitting else None

    @cached_property
    def smallest(self) -> Plan | None:
        """Of all legal layouts the one that needs the least memory."""
        return min(self.fitting + self.too_large, key=lambda plan: plan.memory.peak, default=None)


def rank_layouts(
    recipe: Recipe, gpus: int, cluster: Cluster, limit: float, fixed: Mapping[str, Any] | None = None
) -> Ranking:
    """All layouts on `gpus` GPUs whose tensors may take `limit` bytes; `fixed`: fields that keep their values.

    A layout with recomputation is only planned if it does not fit without, which is always faster.
    """
    fixed = fixed or {}
    found, estimates = candidates(recipe, gpus, cluster.per_node, fixed), Estimates(recipe, cluster)
    choices = (fixed["parallel.recompute"],) if "parallel.recompute" in fixed else RECOMPUTE
    fitting: list[Plan] = []
    too_large: list[Plan] = []
    for layout in found.legal:
        for recompute in choices:
            plan = estimates.plan(replace(layout, recompute=recompute))
            if plan.memory.peak <= limit:
                fitting.append(plan)
                break
            too_large.append(plan)
    for plans in (fitting, too_large):
        plans.sort(key=lambda plan: plan.time.total)
    return Ranking(fitting, too_large, found.refused, limit)


class Estimates:
    """Plans of a recipe's layouts; what several layouts have in common is computed once."""

    def __init__(self, recipe: Recipe, cluster: Cluster):
        self.recipe, self.cluster = recipe, cluster
        self.overlaps = overlaps_of(recipe)
        self._shares: dict[tuple[Any, ...], Share] = {}
        self._stages: dict[tuple[int, int], Stages] = {}

    def plan(self, layout: Layout) -> Plan:
        share, stages = self.share(layout), self.stages(layout)
        micro_batches = micro_batches_of(self.recipe, layout)
        # Later ranks of a kind keep fewer micro-batches.
        peaks = {kind.first: memory_of(share, layout, kind.stage, kind.first, micro_batches) for kind in stages.kinds}
        worst = max(peaks, key=lambda rank: peaks[rank].peak)
        time = step_time(share, self.cluster, layout, stages, micro_batches, self.overlaps)
        return Plan(self.recipe, layout, worst, peaks[worst], time, self.cluster.gpu.bf16_flops)

    def share(self, layout: Layout) -> Share:
        key = (layout.tensor, layout.sequence_parallel, layout.context, layout.expert, layout.state_context)
        key = (*key, layout.micro_batch)
        if key not in self._shares:
            self._shares[key] = share_of(self.recipe, layout)
        return self._shares[key]

    def stages(self, layout: Layout) -> Stages:
        key = (layout.pipeline, layout.virtual)
        if key not in self._stages:
            self._stages[key] = pipeline_stages(self.recipe, *key)
        return self._stages[key]


def micro_batches_of(recipe: Recipe, layout: Layout) -> int:
    """Micro-batches of a step, for one data-parallel rank."""
    return recipe.global_batch_size // (layout.data * layout.micro_batch)


def overlaps_of(recipe: Recipe) -> Overlaps:
    megatron = recipe.megatron
    return Overlaps(
        gradients=bool(megatron.get("overlap_grad_reduce")),
        weights=bool(megatron.get("overlap_param_gather")),
        tensor=bool(megatron.get("tp_comm_overlap")),
    )


def estimated_usage(recipe: Recipe, layout: Layout, rank: int) -> Usage:
    """The formulas' memory and traffic of pipeline rank `rank`, for a recipe in this layout."""
    share = share_of(recipe, layout)
    stage = pipeline_stages(recipe, layout.pipeline, layout.virtual).of_rank[rank]
    micro_batches = micro_batches_of(recipe, layout)
    memory = memory_of(share, layout, stage, rank, micro_batches)
    return Usage(
        weights=memory.weights,
        gradients=memory.gradients,
        optimizer=memory.optimizer,
        activations=memory.activations,
        traffic=traffic_of(share, layout, stage, rank, micro_batches),
    )
