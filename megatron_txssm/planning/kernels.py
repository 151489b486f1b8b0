"""Seconds of a layer's kernels by a roofline per operator; the rates and their sources are in rates.py."""

from functools import cache

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.planning.activations import FP32
from megatron_txssm.planning.memory import gemm_weights
from megatron_txssm.planning.rates import SCAN_BACKWARD, SCAN_FORWARD, SMALL, Cluster
from megatron_txssm.planning.share import Share

# Of each gradient's backward pass relative to its forward pass: dQ, dK, dV, and the scores and their gradient again.
ATTENTION_BACKWARD = 2.5
# Megatron's loss in fp32, bytes per logit: cast, maximum, difference, exponential, sum, quotient; backward product and
# cast (megatron.core.tensor_parallel.cross_entropy).
LOSS_BYTES = 52
# Names the final norm, LM head and loss among layers' symbols.
HEAD = "head"


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
    return cluster.corrections.corrected(layer, forward + more[0], backward + more[1])


def _residual_seconds(share: Share, cluster: Cluster) -> tuple[float, float]:
    """The norm and the residual's addition, five reads or writes forward and six backward, and small kernels."""
    one = cluster.memory_seconds(share.own_tokens * share.hidden * share.element)
    return 5 * one + SMALL.value, 6 * one + SMALL.value


def _swiglu_seconds(share: Share, cluster: Cluster) -> tuple[float, float]:
    return _swiglu(cluster, share.tokens * share.ffn * share.element)


def _swiglu(cluster: Cluster, product: int) -> tuple[float, float]:
    """From the bytes of the product of both halves: reads two and writes one; backward reads three and writes two."""
    return cluster.memory_seconds(3 * product), cluster.memory_seconds(5 * product)


def attention_seconds(share: Share, cluster: Cluster) -> tuple[float, float]:
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
    read = 0.0
    if share.context > 1:
        # The copies of an exchange of heads, or reading the entering state.
        beside += 4 * width * share.inner
        if share.state_context == "state_passing":
            read = cluster.gemm_seconds(share.tokens, share.inner, state.state_size)
    forward, backward = SCAN_FORWARD.value * scanned + beside, SCAN_BACKWARD.value * scanned + 2 * beside
    return cluster.memory_seconds(forward) + read, cluster.memory_seconds(backward) + 2 * read


_INNER = {FFN: _swiglu_seconds, ATTENTION: attention_seconds, STATE_SPACE: _scan_seconds}


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
    return cluster.corrections.corrected(HEAD, product + loss / 2, 2 * product + loss / 2 + added)


@cache
def chunk_seconds(share: Share, cluster: Cluster, chunk: str, recompute: str) -> tuple[float, float]:
    """Kernels of some layers for one micro-batch: forward, backward with what is recomputed."""
    forward = backward = again = 0.0
    for layer in set(chunk):
        count = chunk.count(layer)
        of_layer = layer_seconds(share, cluster, layer)
        forward, backward = forward + count * of_layer[0], backward + count * of_layer[1]
        if recompute == "full" or (recompute == "selective" and layer == FFN and "mlp" in share.selective):
            again += count * of_layer[0]
        elif recompute == "selective" and layer == ATTENTION and "core_attn" in share.selective:
            again += count * attention_seconds(share, cluster)[0]
    return forward, backward + again
