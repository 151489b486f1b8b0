"""The rotation R_{Θ,m} of Unified RoPE (arXiv:2506.09507, eq. 2, 3 and 5), applied to the state space's C and B."""

# B=batch L=sequence G=groups N=state R=N/2 planes of rotation

from typing import Any

import torch
from torch import Tensor

from megatron_txssm.ops.ssd_reference import accumulation_dtype
from megatron_txssm.ops.ssd_triton import import_error, is_available
from megatron_txssm.ops.tracing import is_traced


def apply_rotary(x_BLGN: Tensor, cos_LR: Tensor, sin_LR: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate plane i = (x[i], x[i + N/2]) of every token by that token's angle; tables may also be [B, L, R].

    Half-split pairing, as in Megatron's attention (rotary_interleaved=False). Computed in fp32 (fp64 for fp64 inputs)
    and returned in x's dtype: with bf16 tables the rotation would change norms and depend on more than m - n.
    The backward pass is the inverse rotation and does not save x. The tables get no gradient. `backend` is that of
    `ssd`: where `ssd` uses its kernels, a kernel rotates.
    """
    width, planes = x_BLGN.shape[-1], cos_LR.shape[-1]
    if width % 2:
        raise ValueError(f"width={width} is odd and has no pairs to rotate; use an even d_state")
    if width != 2 * planes:
        raise ValueError(f"width={width} does not fit a table of {planes} planes; use a table for width {width}")
    dtype = accumulation_dtype(x_BLGN)
    cos_L1R, sin_L1R = cos_LR.to(dtype).unsqueeze(-2), sin_LR.to(dtype).unsqueeze(-2)
    if is_traced(x_BLGN, cos_LR, sin_LR):
        # Cast first: the gradients of a half's two uses are then summed before rounding.
        first, second = x_BLGN.to(dtype).chunk(2, dim=-1)
        turned = (first * cos_L1R - second * sin_L1R, second * cos_L1R + first * sin_L1R)
        return torch.cat(turned, dim=-1).to(x_BLGN.dtype)
    # If the kernels are missing, `ssd` raises the error.
    wanted = import_error() is None if backend == "triton" else backend == "auto" and is_available(x_BLGN)
    return _Rotation.apply(x_BLGN, cos_L1R, sin_L1R, wanted and dtype == torch.float32)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLGN: Tensor, cos_L1R: Tensor, sin_L1R: Tensor, by_kernel: bool) -> Tensor:
        ctx.save_for_backward(cos_L1R, sin_L1R)
        ctx.by_kernel = by_kernel
        if by_kernel:
            from megatron_txssm.ops.rotary_triton import rotate

            return rotate(x_BLGN, cos_L1R, sin_L1R)
        return _turned(x_BLGN, cos_L1R, sin_L1R)

    @staticmethod
    def backward(ctx: Any, dy_BLGN: Tensor) -> tuple[Tensor, None, None, None]:
        cos_L1R, sin_L1R = ctx.saved_tensors
        return _Rotation.apply(dy_BLGN, cos_L1R, -sin_L1R, ctx.by_kernel), None, None, None


def _turned(x_BLGN: Tensor, cos_L1R: Tensor, sin_L1R: Tensor) -> Tensor:
    """Writes both halves in place, which saves a concatenation."""
    turned_BLGN = torch.empty(x_BLGN.shape, dtype=cos_L1R.dtype, device=x_BLGN.device)
    first, second = x_BLGN.chunk(2, dim=-1)
    turned_first, turned_second = turned_BLGN.chunk(2, dim=-1)
    torch.mul(first, cos_L1R, out=turned_first).addcmul_(second, sin_L1R, value=-1)
    torch.mul(second, cos_L1R, out=turned_second).addcmul_(first, sin_L1R)
    return turned_BLGN.to(x_BLGN.dtype)
