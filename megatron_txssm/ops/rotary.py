"""The rotation R_{Θ,m} of unified RoPE (arXiv:2506.09507, eq. 2, 3 and 5), applied to C and B of the state space."""

# B=batch L=sequence G=groups N=state R=N/2 planes of rotation

import torch
from torch import Tensor

from megatron_txssm.ops.ssd_reference import accumulation_dtype


def apply_rotary(x_BLGN: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Turns plane i = (x[i], x[i + N/2]) of every token by that token's angle; [B, L, R] tables serve as well.

    Half-split pairing, as Megatron's attention has it (rotary_interleaved=False). Computed in fp32 (fp64 for fp64
    inputs) and returned in x's type: with bf16 tables the rotation would change lengths and depend on more than m - n.
    """
    width, planes = x_BLGN.shape[-1], cos_LR.shape[-1]
    if width % 2:
        raise ValueError(f"width={width} is odd and has no pairs to rotate; use an even d_state")
    if width != 2 * planes:
        raise ValueError(f"width={width} does not fit a table of {planes} planes; use a table for width {width}")
    dtype = accumulation_dtype(x_BLGN)
    first, second = x_BLGN.to(dtype).chunk(2, dim=-1)
    cos, sin = cos_LR.to(dtype).unsqueeze(-2), sin_LR.to(dtype).unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BLGN.dtype)
