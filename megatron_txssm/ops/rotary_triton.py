"""The rotation of rotary.py as one Triton kernel, where PyTorch launches five; each element is read and written once.

Imported where it is called, so that nothing else needs Triton.
"""

# B=batch L=sequence G=groups N=state R=N/2 planes of rotation

from typing import Any

import torch
from torch import Tensor

try:  # transformers requires every unguarded import of an exported model's code.
    import triton
    import triton.language as tl
except ImportError:
    raise


def rotate(x_BLGN: Tensor, cos_L1R: Tensor, sin_L1R: Tensor) -> Tensor:
    """[B, L, G, N] → [B, L, G, N], contiguous: `apply_rotary` (arXiv:2506.09507, eq. 2, 3), computed in fp32.

    x may have any strides; the tables are [L, 1, R] or [B, L, 1, R], fp32.
    """
    batch, length, groups, width = x_BLGN.shape
    planes = width // 2
    cos_BLR, sin_BLR = (table.squeeze(-2).expand(batch, length, planes) for table in (cos_L1R, sin_L1R))
    turned_BLGN = torch.empty(x_BLGN.shape, dtype=x_BLGN.dtype, device=x_BLGN.device)
    if x_BLGN.numel() > 0:
        strides = (*x_BLGN.stride(), *cos_BLR.stride(), *sin_BLR.stride())
        blocks = {"BLOCK_G": triton.next_power_of_2(groups), "BLOCK_R": triton.next_power_of_2(planes)}
        # One program per token: all its groups share the angles.
        launch: Any = _rotate_token[(batch * length,)]
        # Triton launches on the current device.
        with torch.cuda.device_of(x_BLGN):
            launch(x_BLGN, cos_BLR, sin_BLR, turned_BLGN, length, *strides, groups, planes, **blocks)
    return turned_BLGN


@triton.jit
def _rotate_token(
    x,
    cos,
    sin,
    turned,
    length,
    x_b,
    x_l,
    x_g,
    x_n,
    cos_b,
    cos_l,
    cos_r,
    sin_b,
    sin_l,
    sin_r,
    groups,
    planes,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Offsets may exceed 32 bits.
    token = tl.program_id(0).to(tl.int64)
    b, t = token // length, token % length
    g = tl.arange(0, BLOCK_G)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    inside = (g < groups) & (r < planes)
    c = tl.load(cos + b * cos_b + t * cos_l + r * cos_r, mask=r < planes, other=0.0)
    s = tl.load(sin + b * sin_b + t * sin_l + r * sin_r, mask=r < planes, other=0.0)
    source = x + b * x_b + t * x_l + g * x_g + r * x_n
    target = turned + (token * groups + g) * (2 * planes) + r
    turn(source, target, planes * x_n, planes, c, s, inside)


@triton.jit
def turn(source, target, source_step, target_step, c, s, inside):
    """Rotate planes (source[i], source[i + source_step]) by cosine c and sine s; target may be source."""
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + source_step, mask=inside, other=0.0).to(tl.float32)
    # Several threads may load the same element: none may store before all have loaded.
    tl.debug_barrier()
    tl.store(target, (first * c - second * s).to(target.dtype.element_ty), mask=inside)
    tl.store(target + target_step, (second * c + first * s).to(target.dtype.element_ty), mask=inside)
