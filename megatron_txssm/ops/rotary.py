"""The rotation R_{Θ,m} of unified RoPE (arXiv:2506.09507, eq. 2, 3 and 5), applied to C and B of the state space."""

# B=batch L=sequence G=groups N=state R=N/2 planes of rotation

from typing import Any

import torch
from torch import Tensor

from megatron_txssm.ops.ssd_reference import accumulation_dtype
from megatron_txssm.ops.ssd_triton import import_error, is_available
from megatron_txssm.ops.tracing import is_traced


def apply_rotary(x_BLGN: Tensor, cos_LR: Tensor, sin_LR: Tensor, *, backend: str = "auto") -> Tensor:
    """Turns plane i = (x[i], x[i + N/2]) of every token by that token's angle; [B, L, R] tables serve as well.

    Half-split pairing, as Megatron's attention has it (rotary_interleaved=False). Computed in fp32 (fp64 for fp64
    inputs) and returned in x's type: with bf16 tables the rotation would change lengths and depend on more than m - n.
    Nothing of x is kept for the backward pass, which turns back. The tables have no gradient. `backend` is that of
    `ssd`: where its kernels are taken, so is one for the rotation.
    """
    width, planes = x_BLGN.shape[-1], cos_LR.shape[-1]
    if width % 2:
        raise ValueError(f"width={width} is odd and has no pairs to rotate; use an even d_state")
    if width != 2 * planes:
        raise ValueError(f"width={width} does not fit a table of {planes} planes; use a table for width {width}")
    dtype = accumulation_dtype(x_BLGN)
    cos_L1R, sin_L1R = cos_LR.to(dtype).unsqueeze(-2), sin_LR.to(dtype).unsqueeze(-2)
    if is_traced(x_BLGN, cos_LR, sin_LR):
        # In that type from the start: both uses of a half give one gradient, rounded once.
        first, second = x_BLGN.to(dtype).chunk(2, dim=-1)
        turned = (first * cos_L1R - second * sin_L1R, second * cos_L1R + first * sin_L1R)
        return torch.cat(turned, dim=-1).to(x_BLGN.dtype)
    # Without them `ssd` says so.
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
    """Written where it belongs: no halves that are put together afterwards."""
    turned_BLGN = torch.empty(x_BLGN.shape, dtype=cos_L1R.dtype, device=x_BLGN.device)
    first, second = x_BLGN.chunk(2, dim=-1)
    turned_first, turned_second = turned_BLGN.chunk(2, dim=-1)
    torch.mul(first, cos_L1R, out=turned_first).addcmul_(second, sin_L1R, value=-1)
    torch.mul(second, cos_L1R, out=turned_second).addcmul_(first, sin_L1R)
    return turned_BLGN.to(x_BLGN.dtype)
