"""Bytes that a layer keeps for its backward pass, and that its passes need beside them, with Transformer Engine.

One micro-batch on one rank. What the kernels keep: docs/planner.md. Figures of single tensors, as
`ops/ssd_fused_triton.py`, mamba-ssm's `ssd_combined.py` and Transformer Engine's modules allocate them.
"""

from functools import cache

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.planning.share import Share

FP32 = 4
# Layers that full recomputation repeats together (session/render.py): a mixer and its FFN.
RECOMPUTED_TOGETHER = 2


@cache
def kept(share: Share, layer: str, recompute: str) -> int:
    """Bytes that a layer keeps from its forward pass until its backward pass, its input included."""
    residual = share.own_tokens * share.hidden * share.element
    return residual + _beside_input(share, layer, recompute)


@cache
def _beside_input(share: Share, layer: str, recompute: str) -> int:
    """What a layer keeps besides its input, which is the residual stream."""
    if layer == FFN:
        return _normed(share) + _swiglu(share, share.tokens, share.ffn)
    if layer == ATTENTION:
        return _normed(share) + _attention(share, recompute)
    if layer == STATE_SPACE:
        return _normed(share) + _state_space(share)
    assert layer == EXPERTS
    return _experts(share)


def _normed(share: Share) -> int:
    """The norm's output, which is the GEMM's input, and the root of its mean square."""
    return share.own_tokens * (share.hidden * _gemm_input(share) + FP32)


def _gemm_input(share: Share) -> int:
    """Bytes per element of a GEMM's kept input."""
    return 1 if share.fp8 else share.element


def _swiglu(share: Share, tokens: int, channels: int) -> int:
    """Gate and up, and their product, the input of the next GEMM."""
    return tokens * channels * (2 * share.element + _gemm_input(share))


def _attention(share: Share, recompute: str) -> int:
    """Rotated queries and keys, values, output, and the logarithm of each row's sum.

    Selective recomputation only drops the last; its values are a view of the whole projection, which they keep.
    """
    width = 1 if share.fp8_attention else share.element
    projected = share.query + 2 * share.key
    output = share.query * _gemm_input(share)
    if recompute == "selective":
        return share.tokens * ((share.query + share.key + projected) * share.element + output)
    return share.tokens * (projected * width + share.heads * FP32 + output)


def _state_space(share: Share) -> int:
    """The packed projection, rotated B and C, dt, and the output, which is the out-projection's input."""
    state, width = share.sizes.state_space, share.element
    assert state is not None
    packed, rotated = share.packed * width, 2 * share.groups * width
    dt, output = share.state_heads * FP32, share.inner * _gemm_input(share)
    if share.fused_scan:
        turned = rotated if state.position_encoding == "rope" else 0
        return share.tokens * (packed + turned + dt + output)
    # The convolution's input and output, or B and C on their way to the scan; the scan's own output; dt twice, and its
    # sums.
    convolved = (share.inner + 2 * share.groups) * width if state.conv_sizes else rotated
    scanned = share.inner * width
    gate = 2 * share.inner * width if state.gated else 0
    return share.tokens * (packed + convolved + scanned + gate + output + 4 * dt)


def _experts(share: Share) -> int:
    """Norm, router, what is sent to experts, their GEMMs, and the shared expert."""
    normed = share.own_tokens * (share.hidden * share.element + FP32)
    experts = share.sizes.experts
    assert experts is not None
    router = share.own_tokens * experts.num_experts * FP32 * 3
    sent = share.own_tokens * experts.topk * share.hidden * share.element
    received = share.routed * share.hidden * share.element
    return normed + router + sent + received + _swiglu(share, share.routed, share.expert_ffn) + _shared_expert(share)


def _shared_expert(share: Share) -> int:
    return _swiglu(share, share.tokens, share.shared_ffn)


@cache
def beside_backward(share: Share, layer: str) -> int:
    """Bytes that a layer's backward pass needs at most beside what is kept: gradients and intermediate results."""
    residual = share.own_tokens * share.hidden * share.element
    gathered = share.tokens * share.hidden * share.element if share.sequence_parallel else 0
    if layer == FFN:
        return residual + gathered + share.tokens * 3 * share.ffn * share.element
    if layer == ATTENTION:
        gradients = share.tokens * 2 * (share.query + 2 * share.key) * share.element
        return residual + gathered + gradients + share.tokens * share.query * (share.element + FP32)
    if layer == STATE_SPACE:
        return residual + gathered + share.tokens * (share.inner + share.packed) * share.element + _scan_backward(share)
    return 2 * residual + share.routed * (2 * share.hidden + 3 * share.expert_ffn) * share.element


def _scan_backward(share: Share) -> int:
    """mamba-ssm's backward pass: states of each chunk, B's and C's gradients in fp32, scores of each chunk."""
    state = share.sizes.state_space
    assert state is not None
    chunks = -(-share.tokens // state.chunk_size)
    states = chunks * share.inner * state.state_size * (FP32 + 2 * share.element)
    scores = 2 * share.tokens * (share.groups // state.state_size) * state.chunk_size * FP32
    return states + scores + share.tokens * (2 * share.groups + 5 * share.state_heads) * FP32


@cache
def loss_bytes(share: Share) -> int:
    """Kept from the LM head until its loss's backward pass: the logits in fp32, and in their own precision."""
    logits = share.tokens * share.vocabulary
    # Without bf16 the fp32 logits are the head's output, changed in place.
    return logits * (FP32 + share.element if share.element != FP32 else FP32)


@cache
def head_bytes(share: Share) -> int:
    """Kept by the final norm and the LM head: both inputs."""
    return 2 * share.own_tokens * share.hidden * share.element + share.own_tokens * FP32
