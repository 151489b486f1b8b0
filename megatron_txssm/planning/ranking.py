"""Ranks all layouts of a recipe on N GPUs by predicted tokens per second, among those that fit their memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_txssm.architecture.flops import flops_per_token
from megatron_txssm.planning.layouts import Layout, Refused, candidates, layout_of
from megatron_txssm.planning.memory import Memory, memory_of
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.planning.share import Share, Stages, pipeline_stages, share_of
from megatron_txssm.planning.step_time import Overlaps, StepTime, step_time
from megatron_txssm.planning.traffic import traffic_of
from megatron_txssm.planning.usage import Usage
from megatron_txssm.recipe.recipe import Recipe

# A layout that needs up to this many times the limit is a near miss.
NEARLY = 1.5


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
    """Layouts that fit, the fastest first; those that nearly fit, likewise; and the illegal ones.

    Attributes:
        smallest: of all legal layouts the one that needs the least memory; None if none is legal
        limit: bytes that a GPU's tensors may take
    """

    fitting: list[Plan]
    too_large: list[Plan]
    refused: list[Refused]
    smallest: Plan | None
    limit: float

    @property
    def best(self) -> Plan | None:
        return self.fitting[0] if self.fitting else None


def rank_layouts(
    recipe: Recipe, gpus: int, cluster: Cluster, limit: float, fixed: Mapping[str, Any] | None = None
) -> Ranking:
    """All layouts on `gpus` GPUs whose tensors may take `limit` bytes; `fixed`: fields that keep their values.

    A layout with recomputation is only planned if it does not fit without, which is always faster.
    """
    fixed = fixed or {}
    found, estimates = candidates(recipe, gpus, cluster.per_node, fixed), Estimates(recipe, cluster)
    choices = recompute_choices(recipe, fixed)
    fitting: list[Plan] = []
    too_large: list[Plan] = []
    smallest: tuple[int, Layout] | None = None
    for divided in found.legal:
        for recompute in choices:
            layout = divided if recompute == divided.recompute else replace(divided, recompute=recompute)
            worst, memory = estimates.memory(layout)
            if smallest is None or memory.peak < smallest[0]:
                smallest = memory.peak, layout
            if memory.peak <= limit:
                fitting.append(estimates.plan(layout, worst, memory))
                break
            if memory.peak <= NEARLY * limit:
                too_large.append(estimates.plan(layout, worst, memory))
    for plans in (fitting, too_large):
        plans.sort(key=lambda plan: plan.time.total)
    least = None if smallest is None else estimates.plan(smallest[1])
    return Ranking(fitting, too_large, found.refused, least, limit)


def recompute_choices(recipe: Recipe, fixed: Mapping[str, Any]) -> tuple[str, ...]:
    """What may be recomputed, by falling memory and speed.

    Selective only where the recipe states its modules: by default it repeats core attention, of which flash attention
    keeps nothing worth repeating.
    """
    if "parallel.recompute" in fixed:
        return (fixed["parallel.recompute"],)
    return ("none", "selective", "full") if recipe.megatron.get("recompute_modules") else ("none", "full")


def least_memory(recipe: Recipe, gpus: int, cluster: Cluster, fixed: Mapping[str, Any] | None = None) -> int | None:
    """Bytes of a GPU in the legal layout that needs the least; None if none is legal."""
    recompute = recompute_choices(recipe, fixed or {})[-1]
    found, estimates = candidates(recipe, gpus, cluster.per_node, fixed), Estimates(recipe, cluster)
    layouts = (replace(layout, recompute=recompute) for layout in found.legal)
    return min((estimates.memory(layout)[1].peak for layout in layouts), default=None)


class Estimates:
    """Plans of a recipe's layouts; what several layouts have in common is computed once."""

    def __init__(self, recipe: Recipe, cluster: Cluster):
        self.recipe, self.cluster = recipe, cluster
        self.overlaps = overlaps_of(recipe)
        self._shares: dict[tuple[Any, ...], Share] = {}
        self._stages: dict[tuple[int, int], Stages] = {}

    def plan(self, layout: Layout, worst: int | None = None, memory: Memory | None = None) -> Plan:
        """A layout's plan; `worst` and `memory`: what `memory` gave, if it was called before."""
        if worst is None or memory is None:
            worst, memory = self.memory(layout)
        micro_batches = micro_batches_of(self.recipe, layout)
        time = step_time(self.share(layout), self.cluster, layout, self.stages(layout), micro_batches, self.overlaps)
        return Plan(self.recipe, layout, worst, memory, time, self.cluster.gpu.bf16_flops)

    def memory(self, layout: Layout) -> tuple[int, Memory]:
        """The pipeline rank with the largest peak, and its memory."""
        share, stages = self.share(layout), self.stages(layout)
        micro_batches = micro_batches_of(self.recipe, layout)
        # Later ranks of a kind keep fewer micro-batches.
        peaks = {kind.first: memory_of(share, layout, kind.stage, kind.first, micro_batches) for kind in stages.kinds}
        worst = max(peaks, key=lambda rank: peaks[rank].peak)
        return worst, peaks[worst]

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


def estimated_usage(recipe: Recipe, gpus: int, stage: int) -> Usage:
    """The formulas' memory and traffic of a rank of pipeline stage `stage`, for a recipe in its own layout on `gpus`.

    UserError if that is illegal.
    """
    layout = layout_of(recipe, gpus)
    share, held = share_of(recipe, layout), pipeline_stages(recipe, layout.pipeline, layout.virtual).of_rank[stage]
    micro_batches = micro_batches_of(recipe, layout)
    memory = memory_of(share, layout, held, stage, micro_batches)
    return Usage(
        weights=memory.weights,
        gradients=memory.gradients,
        optimizer=memory.optimizer,
        activations=memory.activations,
        traffic=traffic_of(share, layout, held, stage, micro_batches),
    )
