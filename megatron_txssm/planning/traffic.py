"""Bytes that a pipeline rank's collectives carry in a step, by collective and group.

Of each call the largest tensor counts: of an all-gather the gathered one, of a reduce-scatter the one before it.
Not counted: gradient norms, losses and the experts' token counts, which are a few thousand bytes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, STATE_SPACE
from megatron_txssm.planning.layouts import Layout
from megatron_txssm.planning.memory import FP32, Weights, stage_weights
from megatron_txssm.planning.share import Share, Stage


@dataclass(frozen=True)
class Call:
    """`count` calls of a collective: bytes of each one's largest tensor."""

    collective: str
    group: str
    size: int
    count: int = 1


def traffic_of(
    share: Share, layout: Layout, stage: Stage, rank: int, micro_batches: int
) -> Mapping[tuple[str, str], int]:
    """(collective, group) -> bytes per step of pipeline rank `rank`."""
    found: Counter[tuple[str, str]] = Counter()
    for call in (*_micro_batch_calls(share, stage, layout.recompute), *transfer_calls(share, layout, rank)):
        found[call.collective, call.group] += call.size * call.count * micro_batches
    for call in step_calls(share, layout, stage, stage_weights(share, stage, whole=layout.pipeline == 1)):
        found[call.collective, call.group] += call.size * call.count
    return dict(found)


def _micro_batch_calls(share: Share, stage: Stage, recompute: str) -> Iterator[Call]:
    """The calls of one micro-batch, forward and backward, but for the transfers between stages."""
    for layer, count in stage.counts.items():
        forward, backward = layer_calls(share, layer)
        repeats = 2 if recompute == "full" else 1
        yield from (replace(call, count=call.count * count * repeats) for call in forward)
        yield from (replace(call, count=call.count * count) for call in backward)
    if stage.embeds:
        yield from embedding_calls(share)
    if stage.predicts:
        for layers in share.sizes.prediction_depths:
            for layer in layers:
                forward, backward = layer_calls(share, layer)
                yield from (*forward, *backward)
        yield from head_calls(share)


@cache
def layer_calls(share: Share, layer: str) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """One layer's calls for one micro-batch: forward, backward."""
    forward, backward = _tensor_calls(share) if layer != EXPERTS else _expert_calls(share)
    if share.context > 1 and layer == ATTENTION:
        ring_forward, ring_backward = _ring(share)
        forward, backward = forward + ring_forward, backward + ring_backward
    if share.context > 1 and layer == STATE_SPACE:
        exchanged = _state_calls(share)
        forward, backward = forward + exchanged, backward + tuple(map(_reversed, exchanged))
    return forward, backward


def _tensor_calls(share: Share) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """Of a layer with a column- and a row-parallel GEMM."""
    if share.tensor == 1:
        return (), ()
    size = share.tokens * share.hidden * share.element
    if not share.sequence_parallel:
        reduced = Call("all_reduce", "tp", size)
        return (reduced,), (reduced,)
    gather, scatter = Call("all_gather", "tp", size), Call("reduce_scatter", "tp", size)
    # Backward, the column-parallel GEMM's input is gathered once more.
    return (gather, scatter), (replace(gather, count=2), scatter)


def _expert_calls(share: Share) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """Tokens to their experts and back; tensor-parallel ranks then share each expert's tokens."""
    experts = share.sizes.experts
    assert experts is not None
    width = share.hidden * share.element
    sent = share.own_tokens * experts.topk
    calls: list[Call] = []
    if share.expert > 1:
        # Their probabilities go along.
        calls += [Call("all_to_all", "ep", sent * width, 2), Call("all_to_all", "ep", sent * FP32)]
    backward = list(calls)
    if share.tensor > 1:
        # Tokens come with their probabilities, and results are summed in the probabilities' precision.
        gathered, summed = share.routed * (width + FP32), share.routed * share.hidden * FP32
        calls += [Call("all_gather", "tp", gathered), Call("reduce_scatter", "tp", summed)]
        backward += [Call("all_gather", "tp", summed), Call("reduce_scatter", "tp", gathered)]
    if share.shared_ffn:
        forward_tensor, backward_tensor = _tensor_calls(share)
        calls, backward = [*calls, *forward_tensor], [*backward, *backward_tensor]
    return tuple(calls), tuple(backward)


def _ring(share: Share) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
    """Attention's keys and values go around, backward with their gradients; each step sends and receives."""
    block, steps = share.tokens * 2 * share.key * share.element, share.context - 1
    return (Call("send_recv", "cp", block, 2 * steps),), (Call("send_recv", "cp", block, 2 * (2 * steps + 1)),)


def _state_calls(share: Share) -> tuple[Call, ...]:
    """What state-space layers exchange between the pieces of a sequence, forward."""
    state = share.sizes.state_space
    assert state is not None
    calls: list[Call] = []
    if state.conv_sizes:
        channels = share.inner + 2 * share.groups
        tails = 2 * share.context * share.samples * (state.conv_kernel - 1) * channels
        calls.append(Call("all_gather", "cp", tails * share.element))
    if share.state_context == "state_passing":
        # Each piece's state, and its decay beside each of its rows.
        of_piece = share.samples * share.state_heads * (state.head_dim * state.state_size + 1)
        return (*calls, Call("all_gather", "cp", 2 * share.context * of_piece * FP32))
    width = share.tokens * share.element
    exchanged = (
        Call("all_to_all", "cp", width * share.inner, 2),
        Call("all_to_all", "cp", width * share.groups, 2),
        Call("all_to_all", "cp", share.tokens * share.state_heads * FP32),
    )
    return (*calls, *exchanged)


def _reversed(call: Call) -> Call:
    return replace(call, collective="reduce_scatter") if call.collective == "all_gather" else call


@cache
def embedding_calls(share: Share) -> tuple[Call, ...]:
    """Of the embedding, for one micro-batch."""
    if share.tensor == 1:
        return ()
    size = share.tokens * share.hidden * share.element
    if share.sequence_parallel:
        return Call("reduce_scatter", "tp", size), Call("all_gather", "tp", size)
    return (Call("all_reduce", "tp", size),)


@cache
def head_calls(share: Share) -> tuple[Call, ...]:
    """Of the LM head and its loss, and those of prediction depths, for one micro-batch."""
    if share.tensor == 1:
        return ()
    heads, size = 1 + len(share.sizes.prediction_depths), share.tokens * share.hidden * share.element
    # The loss: each token's largest logit, its label's, and the sum.
    loss = Call("all_reduce", "tp", share.tokens * FP32, 3 * heads)
    if share.sequence_parallel:
        return Call("all_gather", "tp", size, 2 * heads), Call("reduce_scatter", "tp", size, heads), loss
    return Call("all_reduce", "tp", size, heads), loss


def transfer_calls(share: Share, layout: Layout, rank: int) -> Iterator[Call]:
    """What a rank receives and sends for each of its virtual stages, forward and backward."""
    if layout.pipeline == 1:
        return
    ends = (rank == 0) + (rank == layout.pipeline - 1)
    yield Call("send_recv", "pp", share.own_tokens * share.hidden * share.element, 2 * (2 * layout.virtual - ends))


def step_calls(share: Share, layout: Layout, stage: Stage, weights: Weights) -> Iterator[Call]:
    """The calls of a step besides its micro-batches: gradients and weights over data parallelism, a tied embedding,
    and under sequence parallelism the gradients of what tensor-parallel ranks have whole: norms and routers.
    """
    sharing = layout.data * layout.context
    # As Megatron names it: with context parallelism the group has both kinds of ranks.
    data = "dp" if layout.context == 1 else "dp_cp"
    groups = [(data, weights.dense, sharing), ("expert_dp", weights.experts, sharing // layout.expert)]
    for group, count, size in groups:
        if size == 1 or count == 0:
            continue
        if layout.zero1:
            yield Call("reduce_scatter", group, count * FP32)
            yield Call("all_gather", group, count * share.element)
        else:
            yield Call("all_reduce", group, count * FP32)
    if share.sequence_parallel and share.tensor > 1:
        experts = share.sizes.experts.num_experts if share.sizes.experts else 0
        rows = stage.counts.total() + stage.counts[EXPERTS] * experts + stage.predicts
        yield Call("all_reduce", "tp", rows * share.hidden * FP32)
    if layout.pipeline > 1 and share.sizes.tie_embeddings and (stage.embeds or stage.predicts):
        yield Call("all_reduce", "embedding", share.vocabulary * share.hidden * FP32)
