"""Seconds of a training step: kernels, the pipeline's bubble, and collectives that are not hidden.

It is a step as one CUDA graph: nothing waits for the CPU.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS
from megatron_txssm.planning.activations import FP32
from megatron_txssm.planning.kernels import attention_seconds, chunk_seconds, head_seconds
from megatron_txssm.planning.layouts import Layout
from megatron_txssm.planning.memory import Weights, gemm_weights, stage_weights
from megatron_txssm.planning.rates import OVERLAP, TENSOR_OVERLAP, Cluster, group_shape
from megatron_txssm.planning.share import Share, Stage, Stages
from megatron_txssm.planning.traffic import Call, embedding_calls, head_calls, layer_calls, step_calls

# Bytes per parameter: Adam reads weight, gradient and two moments and writes all but the gradient; the gradient's norm
# reads, its clipping reads and writes; the bf16 weight is written from the fp32 one.
ADAM_BYTES, NORM_BYTES, COPY_BYTES = 28, 12, 6


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and its parts, which add up to it."""

    # Kernels of the slowest pipeline rank.
    compute: float
    # Tensor, context and expert parallelism, and transfers between stages.
    exchange: float
    # Waiting for other stages at the ends of a step.
    bubble: float
    # Data parallelism, as far as passes do not hide it.
    data: float
    optimizer: float
    # Of the CPU, where it was measured: between layers, and between micro-batches.
    host: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.bubble + self.data + self.optimizer + self.host


@dataclass(frozen=True)
class Overlaps:
    """Megatron's options for collectives beside kernels."""

    gradients: bool
    weights: bool
    tensor: bool


@dataclass(frozen=True)
class Passes:
    """Seconds of one micro-batch on a pipeline rank: kernels forward and backward, collectives that they wait for."""

    forward: float
    backward: float
    exchange: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.exchange


@cache
def _passes(share: Share, cluster: Cluster, stage: Stage, recompute: str, tensor_overlap: bool) -> Passes:
    """Of a pipeline rank, without its transfers to other stages."""
    forward, backward = chunk_seconds(share, cluster, "".join(stage.chunks), recompute)
    if stage.predicts:
        heads = 1 + len(share.sizes.prediction_depths)
        head = head_seconds(share, cluster)
        depths = chunk_seconds(share, cluster, "".join(share.sizes.prediction_depths), "none")
        forward, backward = forward + heads * head[0] + depths[0], backward + heads * head[1] + depths[1]
    if stage.embeds:
        rows = cluster.memory_seconds(2 * share.tokens * share.hidden * share.element)
        forward, backward = forward + rows, backward + 2 * rows
    return Passes(forward, backward, _exchange(share, cluster, stage, recompute, tensor_overlap))


def _exchange(share: Share, cluster: Cluster, stage: Stage, recompute: str, tensor_overlap: bool) -> float:
    """Seconds in which a micro-batch's kernels wait for collectives."""
    if share.tensor == share.context == share.expert == 1:
        return 0.0
    total = 0.0
    depths = Counter("".join(share.sizes.prediction_depths) if stage.predicts else "")
    for layer, count in (stage.counts + depths).items():
        forward, backward = _layer_exchange(share, cluster, layer, tensor_overlap)
        total += count * (forward * (2 if recompute == "full" else 1) + backward)
    for calls in ((embedding_calls(share),) if stage.embeds else ()) + ((head_calls(share),) if stage.predicts else ()):
        total += _seconds(share, cluster, calls, tensor_overlap)
    return total


@cache
def _layer_exchange(share: Share, cluster: Cluster, layer: str, tensor_overlap: bool) -> tuple[float, float]:
    """Of one layer: forward, backward. Attention's ring runs behind its products."""
    behind = attention_seconds(share, cluster) if layer == ATTENTION else (0.0, 0.0)
    forward, backward = layer_calls(share, layer)
    return (
        _seconds(share, cluster, forward, tensor_overlap, behind[0]),
        _seconds(share, cluster, backward, tensor_overlap, behind[1]),
    )


def _seconds(
    share: Share, cluster: Cluster, calls: Iterable[Call], tensor_overlap: bool, ring_behind: float = 0.0
) -> float:
    """Time of a micro-batch's collectives."""
    total = ring = 0.0
    for call in calls:
        members, stride = group_shape(call.group, share.tensor, share.context, expert=share.expert)
        seconds = call.count * cluster.collective_seconds(call.collective, call.size, members, stride)
        if call.group == "cp" and call.collective == "send_recv":
            # Each step sends while it receives.
            ring += seconds / 2
        elif call.group == "tp" and tensor_overlap:
            total += seconds * (1 - TENSOR_OVERLAP.value)
        else:
            total += seconds
    return total + max(0.0, ring - ring_behind)


def step_time(
    share: Share,
    cluster: Cluster,
    layout: Layout,
    stages: Stages,
    micro_batches: int,
    overlaps: Overlaps,
) -> StepTime:
    """The time of a step: the slowest rank's micro-batches, the others' at the ends of the step, and what follows."""
    kinds = [_passes(share, cluster, kind.stage, layout.recompute, overlaps.tensor) for kind in stages.kinds]
    transfers = _transfer_seconds(share, cluster, layout)
    slowest = max(kinds, key=lambda passes: passes.total)
    whole = sum(kind.count * (passes.total + transfers) for kind, passes in zip(stages.kinds, kinds, strict=True))
    after = [
        _after_passes(share, cluster, layout, kind.stage, passes, overlaps)
        for kind, passes in zip(stages.kinds, kinds, strict=True)
    ]
    return StepTime(
        compute=micro_batches * (slowest.forward + slowest.backward),
        exchange=micro_batches * (slowest.exchange + transfers),
        # (p - 1) / (m·v) of the passes if all stages are equal.
        bubble=cluster.corrections.waiting(layout.pipeline) * (whole - slowest.total - transfers) / layout.virtual,
        data=max(data for data, _ in after),
        optimizer=max(optimizer for _, optimizer in after),
        host=micro_batches * cluster.corrections.micro_batch + cluster.corrections.step,
    )


def _transfer_seconds(share: Share, cluster: Cluster, layout: Layout) -> float:
    """A micro-batch's transfers to and from a stage's neighbours; the interleaved schedule hides half of them."""
    if layout.pipeline == 1:
        return 0.0
    _, stride = group_shape("pp", layout.tensor, layout.context, layout.data, pipeline=layout.pipeline)
    size = share.own_tokens * share.hidden * share.element
    seconds = cluster.collective_seconds("send_recv", size, layout.pipeline, stride)
    # Forward and backward, for each virtual stage.
    return 2 * layout.virtual * seconds * (1.0 if layout.virtual == 1 else 0.5)


def _after_passes(
    share: Share, cluster: Cluster, layout: Layout, stage: Stage, passes: Passes, overlaps: Overlaps
) -> tuple[float, float]:
    """Data parallelism's seconds beyond those that passes hide, and the optimizer's.

    Gradients are reduced beside the last backward pass, weights gathered beside the first forward pass.
    """
    weights = stage_weights(share, stage, whole=layout.pipeline == 1)
    gradients = gathered = tied = 0.0
    for call in step_calls(share, layout, stage, weights):
        members, stride = group_shape(
            call.group, layout.tensor, layout.context, layout.data, layout.expert, layout.pipeline
        )
        seconds = cluster.collective_seconds(call.collective, call.size, members, stride)
        if call.group in ("embedding", "tp"):
            tied += seconds
        elif call.collective == "all_gather":
            gathered += seconds
        else:
            gradients += seconds
    gradients -= OVERLAP.value * passes.backward if overlaps.gradients else 0.0
    gathered -= OVERLAP.value * passes.forward if overlaps.weights else 0.0
    updating = _optimizer_seconds(cluster, layout, weights) + _newton_schulz_seconds(share, cluster, stage)
    return max(0.0, gradients) + max(0.0, gathered) + tied, updating


def _optimizer_seconds(cluster: Cluster, layout: Layout, weights: Weights) -> float:
    """Adam on this rank's shard, the gradient's norm and clipping, and zeroing the buffers."""
    sharing = layout.data * layout.context
    dense, experts = (sharing, max(1, sharing // layout.expert)) if layout.zero1 else (1, 1)
    shard = weights.dense / dense + weights.experts / experts
    zeroed = cluster.memory_seconds(weights.total * FP32)
    adam = cluster.adam_seconds(shard * ADAM_BYTES) + cluster.memory_seconds(shard * (NORM_BYTES + COPY_BYTES))
    return cluster.corrections.optimizer * (adam + zeroed)


def _newton_schulz_seconds(share: Share, cluster: Cluster, stage: Stage) -> float:
    """Muon's products: each step has X·Xᵀ, its square, and their sum times X, of whole matrices on every rank.

    Those of a packed projection count as one; prediction depths, routers and shared experts are left out.
    """
    total = 0.0
    for layer, count in stage.counts.items() if share.muon_steps else ():
        for name, (outputs, inputs) in gemm_weights(share, layer).items():
            row_parallel = name in ("fc2", "proj", "out_proj")
            whole = (outputs, inputs * share.tensor) if row_parallel else (outputs * share.tensor, inputs)
            short, long = sorted(whole)
            step = 2 * cluster.gemm_seconds(short, short, long) + cluster.gemm_seconds(short, short, short)
            total += share.muon_steps * step * count * (share.experts_per_rank if layer == EXPERTS else 1)
    return total
