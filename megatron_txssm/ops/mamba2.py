"""Mamba-2's convolution before the scan and its gated norm after it (arXiv:2405.21060, section 7).

Where `ssd` uses mamba-ssm's kernels (`is_fused`), these use fused kernels where possible: mamba-ssm's for the norm
(2.3.2.post1), causal-conv1d's for the convolution (1.7.0; mamba-ssm does not require it, so it may be absent).
Both compute in fp32, round once, and save only their inputs for the backward pass. Neither uses atomics under
torch.use_deterministic_algorithms.
"""

# B=batch L=sequence E=channels K=convolution taps; [..., E]: any layout of tokens

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_txssm.ops.ssd import is_fused
from megatron_txssm.ops.ssd_triton import MAX_OFFSET

# Each program of mamba-ssm's norm holds a whole group.
MAX_GROUP_BYTES = 2**16


def causal_convolution(
    x_BLE: Tensor,
    weight_E1K: Tensor,
    bias_E: Tensor,
    *,
    history_BEK: Tensor | None = None,
    document_BL: Tensor | None = None,
    document_before_BK: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """SiLU of a causal depthwise convolution, [B, L, E] → [B, L, E].

    history_BEK:        the K-1 inputs before token 0; zeros if absent.
    document_BL:        each token's document, numbered from 1; no tap reaches into another document.
    document_before_BK: the same for the history; if absent, its tokens belong to no document.
    """
    taps = weight_E1K.shape[-1]
    if document_before_BK is None and _convolves(backend, x_BLE, weight_E1K, bias_E):
        if document_BL is not None:
            history_BEK, document_BL = None, document_BL.int()
        elif history_BEK is not None:
            history_BEK = history_BEK.to(x_BLE.dtype).mT.contiguous().mT
        options = {"seq_idx": document_BL, "initial_states": history_BEK, "activation": "silu"}
        return _causal_conv1d()(x_BLE.mT, weight_E1K.squeeze(1), bias_E, **options).mT
    if history_BEK is None:
        history_BEK = x_BLE.new_zeros(x_BLE.shape[0], x_BLE.shape[2], taps - 1)
    seen_BEL = torch.cat([history_BEK, x_BLE.mT], dim=-1)
    if document_BL is None:
        return F.silu(F.conv1d(seen_BEL, weight_E1K, bias_E, groups=x_BLE.shape[2])).mT
    if document_before_BK is None:
        document_before_BK = document_BL.new_zeros(document_BL.shape[0], taps - 1)
    return F.silu(_convolved_documents(seen_BEL, weight_E1K, bias_E, document_BL, document_before_BK)).mT


def _convolved_documents(
    seen_BEL: Tensor, weight_E1K: Tensor, bias_E: Tensor, document_BL: Tensor, document_before_BK: Tensor
) -> Tensor:
    """The convolution, tap by tap; taps that leave the document are masked."""
    seen_BL, length = torch.cat([document_before_BK, document_BL], dim=1), document_BL.shape[1]
    out_BEL = bias_E[:, None]
    for tap in range(weight_E1K.shape[-1]):
        inside_B1L = (seen_BL[:, tap : tap + length] == document_BL)[:, None]
        out_BEL = out_BEL + weight_E1K[:, :, tap] * (seen_BEL[..., tap : tap + length] * inside_B1L)
    return out_BEL


def gated_rms_norm(y: Tensor, z: Tensor, weight_E: Tensor, *, groups: int, eps: float, backend: str = "auto") -> Tensor:
    """RMSNorm of y·silu(z) within each group of channels, times the weight; [..., E] → [..., E] in y's dtype."""
    size = y.shape[-1] // groups
    fits = size * y.element_size() <= MAX_GROUP_BYTES and max(map(_last_offset, (y, z))) <= MAX_OFFSET
    if fits and is_fused(backend, y, z, weight_E):
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # pyright: ignore[reportMissingImports]

        return rmsnorm_fn(y, weight_E, None, z=z, eps=eps, group_size=size, norm_before_gate=False)
    gated = (y.float() * F.silu(z.float())).unflatten(-1, (groups, size))
    normed = F.rms_norm(gated, gated.shape[-1:], eps=eps).flatten(-2)
    return (normed * weight_E.float()).to(y.dtype)


def _convolves(backend: str, x_BLE: Tensor, weight_E1K: Tensor, bias_E: Tensor) -> bool:
    """Whether causal-conv1d is installed and accepts these: it reads 8 channels, or 16 bytes, of a token at once."""
    if not is_fused(backend, x_BLE, weight_E1K, bias_E) or _causal_conv1d() is None:
        return False
    batch, token, channel = x_BLE.stride()
    # It checks sizes and strides itself and raises, but not the address.
    aligned = channel == 1 and not any(n % 8 for n in (batch, token, x_BLE.shape[2])) and x_BLE.data_ptr() % 16 == 0
    return aligned and 2 <= weight_E1K.shape[-1] <= 4 and _last_offset(x_BLE) <= MAX_OFFSET


@functools.cache
def _causal_conv1d() -> Any:
    """causal_conv1d_fn, or None if it cannot be imported."""
    try:
        from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return causal_conv1d_fn


def _last_offset(tensor: Tensor) -> int:
    """The largest element offset in memory: kernels compute index times stride in 32 bits."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
