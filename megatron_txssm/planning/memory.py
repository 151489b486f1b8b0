"""Memory of a pipeline rank: weights, gradients, optimizer and the peak of activations, in bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.planning.activations import (
    FP32,
    beside_backward,
    head_bytes,
    kept,
    loss_bytes,
)
from megatron_txssm.planning.layouts import Layout
from megatron_txssm.planning.share import Share, Stage, chunks_in_flight

# Besides tensors: workspaces of cuBLAS (32 MiB for each of torch and Transformer Engine), and what torch's allocator
# adds to large blocks. Measured minus tensors, one H100: docs/planner.md.
DEVICE_BYTES = 150 * 2**20


@dataclass(frozen=True)
class Weights:
    """Parameters of one rank; those of experts have their own data-parallel group."""

    dense: int
    experts: int
    # Of `dense`: A_log, dt_bias and D, which are fp32 in every precision.
    fp32: int
    # Of `dense`: what Muon would update, as it would all of the experts'.
    matrices: int

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(
            self.dense + other.dense,
            self.experts + other.experts,
            self.fp32 + other.fp32,
            self.matrices + other.matrices,
        )

    def __mul__(self, count: int) -> "Weights":
        return Weights(self.dense * count, self.experts * count, self.fp32 * count, self.matrices * count)

    @property
    def total(self) -> int:
        return self.dense + self.experts


@cache
def gemm_weights(share: Share, layer: str) -> Mapping[str, tuple[int, int]]:
    """A layer's GEMMs by name: (outputs, inputs) of this rank's weight. Of a layer of experts: of one expert."""
    hidden, sizes = share.hidden, share.sizes
    if layer == FFN:
        return {"fc1": (2 * share.ffn, hidden), "fc2": (hidden, share.ffn)}
    if layer == ATTENTION:
        return {"qkv": (share.query + 2 * share.key, hidden), "proj": (hidden, share.query)}
    if layer == STATE_SPACE:
        return {"in_proj": (share.packed, hidden), "out_proj": (hidden, share.inner)}
    assert layer == EXPERTS and sizes.experts is not None
    return {"fc1": (2 * share.expert_ffn, hidden), "fc2": (hidden, share.expert_ffn)}


@cache
def layer_weights(share: Share, layer: str) -> Weights:
    """Parameters of one layer with its norm."""
    matrices = sum(outputs * inputs for outputs, inputs in gemm_weights(share, layer).values())
    norm = share.hidden
    if layer == EXPERTS:
        experts = share.sizes.experts
        assert experts is not None
        always = (experts.num_experts + 3 * share.shared_ffn) * share.hidden
        return Weights(norm + always, share.experts_per_rank * matrices, 0, always)
    if layer != STATE_SPACE:
        return Weights(norm + matrices, 0, 0, matrices)
    state = share.sizes.state_space
    assert state is not None
    per_head = share.state_heads * (1 + state.dt_bias + bool(state.conv_sizes))
    convolution = sum(state.conv_sizes.values()) // share.tensor * (state.conv_kernel + 1)
    gate = share.inner if state.gated else 0
    return Weights(norm + matrices + per_head + convolution + gate, 0, per_head, matrices)


@cache
def stage_weights(share: Share, stage: Stage, *, whole: bool) -> Weights:
    """Parameters of a pipeline rank; `whole`: the pipeline has no other, so that embedding and head may be one."""
    found = Weights(0, 0, 0, 0)
    for layer, count in stage.counts.items():
        found += layer_weights(share, layer) * count
    table, sizes = share.vocabulary * share.hidden, share.sizes
    tables = stage.embeds + (stage.predicts and not (whole and sizes.tie_embeddings))
    if stage.predicts:
        found += Weights(share.hidden, 0, 0, 0)
        for depth in sizes.prediction_depths:
            projection = 2 * share.hidden**2 // share.tensor
            found += Weights(projection + 3 * share.hidden, 0, 0, projection)
            for layer in depth:
                found += layer_weights(share, layer)
        # Depths read the embedding, which untied models then have twice.
        tables += bool(sizes.prediction_depths) and not stage.embeds and not sizes.tie_embeddings
    return found + Weights(tables * table, 0, 0, 0)


@dataclass(frozen=True)
class Memory:
    """One rank's bytes by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_of(share: Share, layout: Layout, stage: Stage, rank: int, micro_batches: int) -> Memory:
    """Memory of pipeline rank `rank`, with `micro_batches` a step."""
    weights = stage_weights(share, stage, whole=layout.pipeline == 1)
    wide = weights.fp32 * (FP32 - share.element)
    quantized = _fp8_copies(share, stage) if share.fp8 else 0
    plain, optimizer = weights.total * share.element + wide, _optimizer(share, layout, weights)
    # Before the first step the distributed optimizer copies the weights to a buffer, beside that of the gradients.
    building = plain - optimizer if layout.zero1 else 0
    return Memory(
        weights=plain + quantized,
        gradients=weights.total * FP32,
        optimizer=optimizer,
        activations=max(activations(share, layout, stage, rank, micro_batches), building) + DEVICE_BYTES,
    )


def _optimizer(share: Share, layout: Layout, weights: Weights) -> int:
    """Two moments, of Muon one, and a master copy unless the weights are fp32 themselves; this rank's shard of them."""
    masters = 0 if share.element == FP32 else FP32
    sharing = layout.data * layout.context if layout.zero1 else 1
    expert_sharing = max(1, layout.data * layout.context // layout.expert) if layout.zero1 else 1
    saved = FP32 if share.muon_steps else 0
    dense = weights.dense * (2 * FP32 + masters) - weights.fp32 * masters - weights.matrices * saved
    return dense // sharing + weights.experts * (2 * FP32 + masters - saved) // expert_sharing


@cache
def _fp8_copies(share: Share, stage: Stage) -> int:
    """Each GEMM's weight in FP8, as it is and transposed."""
    found = 0
    for layer, count in stage.counts.items():
        matrices = sum(outputs * inputs for outputs, inputs in gemm_weights(share, layer).values())
        found += 2 * count * matrices * (share.experts_per_rank if layer == EXPERTS else 1)
    return found


def activations(share: Share, layout: Layout, stage: Stage, rank: int, micro_batches: int) -> int:
    """The peak of what a step allocates: all micro-batches in flight, and the worst moment of one of them."""
    in_flight = chunks_in_flight(layout.pipeline, layout.virtual, rank, micro_batches)
    kept_by_chunk = [_chunk(share, chunk, layout.recompute) for chunk in stage.chunks]
    held = sum(count * size for count, size in zip(in_flight, kept_by_chunk, strict=True))
    return (
        held
        + _worst_moment(share, stage, layout.recompute)
        + _kept_between_steps(share, stage)
        + _pipeline_buffers(share, layout, rank)
    )


@cache
def _chunk(share: Share, chunk: str, recompute: str) -> int:
    """What one virtual stage keeps of a micro-batch."""
    if recompute == "full":
        residual = share.own_tokens * share.hidden * share.element
        return len(_recomputed_together(share, chunk)) * residual
    return sum(kept(share, layer, recompute) for layer in chunk)


def _recomputed_together(share: Share, chunk: str) -> list[str]:
    """The layers that full recomputation repeats at once: a mixer and its FFN, or each alone (session/render.py)."""
    size = 1 if share.sizes.prediction_depths else 2
    return [chunk[start : start + size] for start in range(0, len(chunk), size)]


@cache
def _worst_moment(share: Share, stage: Stage, recompute: str) -> int:
    """The largest of: the loss, and the backward pass of a layer, recomputed before it or not."""
    kinds = set(stage.counts)
    moments = [beside_backward(share, layer) for layer in kinds]
    if recompute == "full":
        # The first layer's input is what was kept.
        moments = [
            sum(kept(share, layer, "none") for layer in together)
            - share.own_tokens * share.hidden * share.element
            + max(beside_backward(share, layer) for layer in together)
            for chunk in stage.chunks
            for together in _recomputed_together(share, chunk)
        ]
    worst = max(moments)
    if not stage.predicts:
        return worst
    depths = len(share.sizes.prediction_depths)
    # Each depth's loss keeps its logits in fp32 until its backward pass.
    losses = loss_bytes(share) + depths * share.tokens * share.vocabulary * FP32
    extra = sum(kept(share, layer, "none") for depth in share.sizes.prediction_depths for layer in depth)
    return head_bytes(share) * (1 + depths) + extra + max(losses, worst)


@cache
def _kept_between_steps(share: Share, stage: Stage) -> int:
    """Placeholders of weight gradients, one of each shape, that Transformer Engine and Megatron keep; rotary tables."""
    shapes = {shape for layer in stage.counts for shape in gemm_weights(share, layer).values()}
    head = share.vocabulary * share.hidden if stage.predicts else 0
    placeholders = (sum(outputs * inputs for outputs, inputs in shapes) + head) * share.element
    return placeholders + 2 * share.seq_length * share.sizes.kv_channels * FP32


def _pipeline_buffers(share: Share, layout: Layout, rank: int) -> int:
    """What is received from, or sent to, neighbours."""
    neighbours = (rank > 0) + (rank < layout.pipeline - 1)
    return neighbours * share.own_tokens * share.hidden * share.element
