"""Seconds of a training step by a roofline per operator, the pipeline's bubble, and collectives that are not hidden.

It is a step as one CUDA graph: nothing waits for the CPU. The rates and their sources are in rates.py.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.planning.activations import FP32
from megatron_txssm.planning.layouts import Layout
from megatron_txssm.planning.memory import Weights, gemm_weights, stage_weights
from megatron_txssm.planning.rates import (
    OVERLAP,
    SCAN_BACKWARD,
    SCAN_FORWARD,
    SMALL,
    TENSOR_OVERLAP,
    Cluster,
    group_shape,
)
from megatron_txssm.planning.share import Share, Stage, Stages
from megatron_txssm.planning.traffic import Call, embedding_calls, head_calls, layer_calls, step_calls

# Of each gradient's backward pass relative to its forward pass: dQ, dK, dV, and the scores and their gradient again.
ATTENTION_BACKWARD = 2.5
# Bytes per parameter: Adam reads weight, gradient and two moments and writes all but the gradient; the gradient's norm
# reads, its clipping reads and writes; the bf16 weight is written from the fp32 one.
ADAM_BYTES, NORM_BYTES, COPY_BYTES = 28, 12, 6
# Megatron's loss in fp32, bytes per logit: cast, maximum, difference, exponential, sum, quotient; backward product and
# cast (megatron.core.tensor_parallel.cross_entropy).
LOSS_BYTES = 52


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

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.bubble + self.data + self.optimizer


@cache
def layer_seconds(share: Share, cluster: Cluster, layer: str) -> tuple[float, float]:
    """Kernels of one layer for one micro-batch: forward, backward."""
    forward, backward = _residual_seconds(share, cluster)
    if layer == EXPERTS:
        more = _expert_seconds(share, cluster)
    else:
        shapes = gemm_weights(share, layer).values()
        products = sum(cluster.gemm_seconds(share.tokens, *shape, fp8=share.fp8) for shape in shapes)
        # Weight gradients are added to fp32 buffers.
        added = cluster.memory_seconds(2 * FP32 * sum(outputs * inputs for outputs, inputs in shapes))
        inner_forward, inner_backward = _INNER[layer](share, cluster)
        more = products + inner_forward, 2 * products + added + inner_backward
    return forward + more[0], backward + more[1]


def _residual_seconds(share: Share, cluster: Cluster) -> tuple[float, float]:
    """The norm and the residual's addition, five reads or writes forward and six backward, and small kernels."""
    one = cluster.memory_seconds(share.own_tokens * share.hidden * share.element)
    return 5 * one + SMALL.value, 6 * one + SMALL.value


def _swiglu_seconds(share: Share, cluster: Cluster) -> tuple[float, float]:
    return _swiglu(cluster, share.tokens * share.ffn * share.element)


def _swiglu(cluster: Cluster, product: int) -> tuple[float, float]:
    """From the bytes of the product of both halves: reads two and writes one; backward reads three and writes two."""
    return cluster.memory_seconds(3 * product), cluster.memory_seconds(5 * product)


def _attention_seconds(share: Share, cluster: Cluster) -> tuple[float, float]:
    """Rotation and flash attention over the causal half; pieces of a zigzag cost the same on every rank."""
    flops = 4.0 * share.tokens * share.seq_length / 2 * share.query
    products = cluster.attention_seconds(flops, share.sizes.kv_channels)
    # Rotation of queries and keys, and the copy of the values.
    moved = cluster.memory_seconds(2 * share.tokens * (share.query + 2 * share.key) * share.element)
    return products + moved, ATTENTION_BACKWARD * products + 2 * moved


def _scan_seconds(share: Share, cluster: Cluster) -> tuple[float, float]:
    """Rotation, scan, and what variants have beside it, in which no GEMM of Transformer Engine takes part."""
    state = share.sizes.state_space
    assert state is not None
    width = share.tokens * share.element
    scanned = share.tokens * share.inner * state.state_size / 128
    beside = 2 * width * (share.packed if state.conv_sizes or not share.fused_scan else 2 * share.groups)
    beside += 4 * width * share.inner if state.gated else 0
    # The copies of an exchange of heads, or reading the entering state.
    beside += 4 * width * share.inner if share.context > 1 else 0
    forward, backward = SCAN_FORWARD.value * scanned + beside, SCAN_BACKWARD.value * scanned + 2 * beside
    return cluster.memory_seconds(forward), cluster.memory_seconds(backward)


_INNER = {FFN: _swiglu_seconds, ATTENTION: _attention_seconds, STATE_SPACE: _scan_seconds}


def _expert_seconds(share: Share, cluster: Cluster) -> tuple[float, float]:
    """Router, permutations, grouped GEMMs, and the shared expert."""
    experts = share.sizes.experts
    assert experts is not None
    each = max(1, share.routed // max(1, share.experts_per_rank))
    shapes = gemm_weights(share, EXPERTS).values()
    products = sum(cluster.gemm_seconds(each, *shape, fp8=share.fp8) for shape in shapes) * share.experts_per_rank
    products += cluster.gemm_seconds(share.own_tokens, experts.num_experts, share.hidden)
    # To the experts and back: a permutation at either end.
    moved = cluster.memory_seconds(8 * share.routed * share.hidden * share.element)
    forward, backward = _swiglu(cluster, share.routed * share.expert_ffn * share.element)
    if share.shared_ffn:
        for shape in ((2 * share.shared_ffn, share.hidden), (share.hidden, share.shared_ffn)):
            products += cluster.gemm_seconds(share.tokens, *shape, fp8=share.fp8)
        more = _swiglu(cluster, share.tokens * share.shared_ffn * share.element)
        forward, backward = forward + more[0], backward + more[1]
    added = cluster.memory_seconds(
        2 * FP32 * share.experts_per_rank * sum(outputs * inputs for outputs, inputs in shapes)
    )
    return products + moved + forward, 2 * products + moved + backward + added


@cache
def head_seconds(share: Share, cluster: Cluster) -> tuple[float, float]:
    """LM head and loss of one micro-batch; the head multiplies in bf16."""
    product = cluster.gemm_seconds(share.tokens, share.vocabulary, share.hidden)
    loss = cluster.memory_seconds(share.tokens * share.vocabulary * LOSS_BYTES)
    # The head's gradient is a product in bf16, then added to the buffer.
    added = cluster.memory_seconds(share.vocabulary * share.hidden * (2 * FP32 + 2 * share.element))
    return product + loss / 2, 2 * product + loss / 2 + added


@cache
def _chunk_seconds(share: Share, cluster: Cluster, chunk: str, recompute: str) -> tuple[float, float]:
    """Kernels of some layers for one micro-batch: forward, backward with what is recomputed."""
    forward = backward = again = 0.0
    for layer in set(chunk):
        count = chunk.count(layer)
        of_layer = layer_seconds(share, cluster, layer)
        forward, backward = forward + count * of_layer[0], backward + count * of_layer[1]
        if recompute == "full":
            again += count * of_layer[0]
        elif recompute == "selective" and layer == ATTENTION:
            again += count * _attention_seconds(share, cluster)[0]
    return forward, backward + again


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
    forward, backward = _chunk_seconds(share, cluster, "".join(stage.chunks), recompute)
    if stage.predicts:
        heads = 1 + len(share.sizes.prediction_depths)
        head = head_seconds(share, cluster)
        depths = _chunk_seconds(share, cluster, "".join(share.sizes.prediction_depths), "none")
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
    behind = _attention_seconds(share, cluster) if layer == ATTENTION else (0.0, 0.0)
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
        bubble=(whole - slowest.total - transfers) / layout.virtual,
        data=max(data for data, _ in after),
        optimizer=max(optimizer for _, optimizer in after),
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
        if call.group == "embedding":
            tied += seconds
        elif call.collective == "all_gather":
            gathered += seconds
        else:
            gradients += seconds
    gradients -= OVERLAP.value * passes.backward if overlaps.gradients else 0.0
    gathered -= OVERLAP.value * passes.forward if overlaps.weights else 0.0
    return max(0.0, gradients) + max(0.0, gathered) + tied, _optimizer_seconds(cluster, layout, weights)


def _optimizer_seconds(cluster: Cluster, layout: Layout, weights: Weights) -> float:
    """Adam on this rank's shard, the gradient's norm and clipping, and zeroing the buffers."""
    sharing = layout.data * layout.context
    dense, experts = (sharing, max(1, sharing // layout.expert)) if layout.zero1 else (1, 1)
    shard = weights.dense / dense + weights.experts / experts
    zeroed = cluster.memory_seconds(weights.total * FP32)
    return cluster.adam_seconds(shard * ADAM_BYTES) + cluster.memory_seconds(shard * (NORM_BYTES + COPY_BYTES)) + zeroed
