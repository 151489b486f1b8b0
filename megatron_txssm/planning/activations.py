"""Bytes that a layer keeps for its backward pass, and that its passes need beside them, with Transformer Engine.

One micro-batch on one rank. What the kernels keep: docs/planner.md. Figures of single tensors, as
`ops/ssd_fused_triton.py`, mamba-ssm's `ssd_combined.py` and Transformer Engine's modules allocate them.
"""

from functools import cache

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.planning.share import Share

FP32 = 4


@cache
def kept(share: Share, layer: str, recompute: str) -> int:
    """Bytes that a layer keeps from its forward pass until its backward pass, its input included."""
    residual = share.own_tokens * share.hidden * share.element
    return residual + _beside_input(share, layer, recompute)


@cache
def _beside_input(share: Share, layer: str, recompute: str) -> int:
    """What a layer keeps besides its input, which is the residual stream."""
    if layer == FFN:
        if recompute == "selective" and "mlp" in share.selective:
            return 0
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
    if recompute == "selective" and "core_attn" in share.selective:
        return share.tokens * ((share.query + share.key + projected) * share.element + output)
    return share.tokens * (projected * width + share.heads * FP32 + output)


def _state_space(share: Share) -> int:
    """All between a state-space layer's projections, and the output, which is the out-projection's input."""
    state, width = share.sizes.state_space, share.element
    assert state is not None
    output = share.tokens * share.inner * _gemm_input(share)
    if share.fused_scan:
        # The packed projection, rotated B and C, and dt.
        turned = 2 * share.groups * width if state.position_encoding == "rope" else 0
        return output + share.tokens * (share.packed * width + turned + share.state_heads * FP32)
    inputs = _scan_inputs(share)
    if share.context > 1 and share.state_context == "state_passing":
        return output + inputs + _scan_kept(share) + _entering_states(share)
    return output + inputs + _scan_kept(share)


def _scan_inputs(share: Share) -> int:
    """What the unfused scan's inputs come from: the projection, the convolution, and copies for other ranks."""
    state, width = share.sizes.state_space, share.element
    assert state is not None
    scanned = share.inner + 2 * share.groups
    if share.context == 1:
        convolved = scanned if state.conv_sizes else 2 * share.groups
        return share.tokens * (share.packed + convolved) * width
    # Pieces or heads are copies, behind which only the gate keeps the projection. PyTorch convolves pieces: it keeps
    # the tokens with their predecessors, and the sum, whose SiLU is what is copied.
    packed = share.packed if state.gated else 0
    return share.tokens * (packed + scanned * (3 if state.conv_sizes else 1)) * width


def _scan_kept(share: Share) -> int:
    """mamba-ssm's scan keeps its output, and of dt the sum, the softplus, and the chunks' sums; a gate its input."""
    state = share.sizes.state_space
    assert state is not None
    # A batch of one needs no copy to be in Megatron's order.
    gate = share.inner if state.gated and share.samples > 1 else 0
    return share.tokens * ((share.inner + gate) * share.element + 4 * share.state_heads * FP32)


def _entering_states(share: Share) -> int:
    """State passing, in fp32: C, what is read of the entering states, and the states of all pieces and before them."""
    state = share.sizes.state_space
    assert state is not None
    of_piece = share.samples * share.inner * state.state_size * FP32
    read = share.tokens * (share.inner + share.groups + 2 * share.state_heads) * FP32
    return read + (4 * share.context + 1) * of_piece


def _experts(share: Share) -> int:
    """Norm, router, what arrives at the experts, their GEMMs, and the shared expert."""
    normed = share.own_tokens * (share.hidden * share.element + FP32)
    experts = share.sizes.experts
    assert experts is not None
    router = share.own_tokens * experts.num_experts * FP32 * 3
    received = share.routed * share.hidden * share.element
    return normed + router + received + _swiglu(share, share.routed, share.expert_ffn) + _shared_expert(share)


def _shared_expert(share: Share) -> int:
    return _swiglu(share, share.tokens, share.shared_ffn)


@cache
def beside_backward(share: Share, layer: str) -> int:
    """Bytes that a layer's backward pass needs at most beside what is kept: gradients and intermediate results."""
    residual = share.own_tokens * share.hidden * share.element
    gathered = share.tokens * share.hidden * share.element if share.sequence_parallel else 0
    if layer == FFN:
        # Gradients of the product, and of gate and up; the product itself is no longer needed then.
        return residual + gathered + share.tokens * 2 * share.ffn * share.element
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
