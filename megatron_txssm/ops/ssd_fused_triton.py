"""A state-space layer between its projections as one autograd function: mamba-ssm's kernels and two of ours; CUDA only.

Same result as rotary.py, softplus and `ssd` in sequence, with fewer launches around mamba-ssm's kernels: one kernel
prepares a token's B, C and dt; the gradients of x, B, C and dt are written directly into the packed projection's
gradient, where a second kernel finishes them. README.md counts launches and bytes.

mamba-ssm accepts dt before the softplus, but computes log(exp(dt) + 1), which has three digits at dt = 1e-4 and is
zero below 6e-8. The notes on precision and reproducibility in ssd_triton.py apply here, too.

Imported where it is called, so that nothing else needs Triton.
"""

# B=batch L=sequence E=packed channels D=H·P H=heads P=head dim G=groups N=state R=N/2 planes of rotation

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_txssm.ops.rotary_triton import turn
from megatron_txssm.ops.ssd_reference import number_documents
from megatron_txssm.ops.ssd_triton import check_size, rounded_chunk_size


class Sizes(NamedTuple):
    head_dim: int
    groups: int
    state_size: int
    # Tokens.
    chunk_size: int


def scan_packed(
    packed_LBE: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor | None,
    tables: tuple[Tensor, Tensor] | None,
    sizes: Sizes,
    *,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """[L, B, E] → [L, B, D], contiguous: the state-space layer between in-projection and out-projection.

    packed_LBE: columns x [H·P], B [G·N], C [G·N], dt [H] before bias and softplus, padding, whose gradient is zero.
    A_log_H:    A = -exp(A_log).
    tables:     cosines and sines of `apply_rotary`, [L, R], fp32, without gradient; None: B and C are not rotated.
    seq_idx:    as in `ssd`.
    """
    cos_LR, sin_LR = tables or (None, None)
    for table_LR in tables or ():
        # Our kernels assume contiguous rows of this width.
        assert table_LR.shape == (packed_LBE.shape[0], sizes.state_size // 2) and table_LR.is_contiguous()
    # The kernels give a chunk's state to all later tokens with the same number, even across another document.
    document_BL = None if seq_idx is None else number_documents(seq_idx)
    sizes = sizes._replace(chunk_size=rounded_chunk_size(sizes.chunk_size))
    return _ScanPacked.apply(packed_LBE.contiguous(), A_log_H, dt_bias_H, cos_LR, sin_LR, document_BL, sizes)


def _kernels() -> tuple[Any, Any]:
    """mamba-ssm's forward and backward scan of a sequence, outside autograd."""
    from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
        _mamba_chunk_scan_combined_bwd,
        _mamba_chunk_scan_combined_fwd,
    )

    return _mamba_chunk_scan_combined_fwd, _mamba_chunk_scan_combined_bwd


class _ScanPacked(torch.autograd.Function):
    """Saves the packed projection, rotated B and C, and dt; not y, which mamba-ssm's own function saves needlessly."""

    @staticmethod
    def forward(
        ctx: Any,
        packed_LBE: Tensor,
        A_log_H: Tensor,
        dt_bias_H: Tensor | None,
        cos_LR: Tensor | None,
        sin_LR: Tensor | None,
        document_BL: Tensor | None,
        sizes: Sizes,
    ) -> Tensor:
        scan, _ = _kernels()
        heads = A_log_H.shape[0]
        x_BLHP, BC_BLGN = _x_and_BC(packed_LBE, heads, sizes)
        turned_LBGN = None
        if cos_LR is not None:
            turned_LBGN = packed_LBE.new_empty(*packed_LBE.shape[:2], 2 * sizes.groups, sizes.state_size)
            BC_BLGN = turned_LBGN.transpose(0, 1)
        dt_LBH = packed_LBE.new_empty(*packed_LBE.shape[:2], heads, dtype=torch.float32)
        A_H = torch.empty_like(A_log_H, dtype=torch.float32)
        B_BLGN, C_BLGN = BC_BLGN.chunk(2, dim=2)
        dt_BLH = dt_LBH.transpose(0, 1)
        check_size(x_BLHP, dt_BLH, B_BLGN, C_BLGN, sizes.chunk_size)
        _launch(_prepare_token, packed_LBE, heads, sizes, A_log_H, dt_bias_H, cos_LR, sin_LR, turned_LBGN, dt_LBH, A_H)
        y_BLHP, *_ = scan(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, chunk_size=sizes.chunk_size, seq_idx=document_BL)
        ctx.save_for_backward(packed_LBE, turned_LBGN, dt_LBH, A_H, dt_bias_H, cos_LR, sin_LR, document_BL)
        ctx.sizes = sizes
        # A copy unless the batch is 1: mamba-ssm allocates y itself.
        return y_BLHP.transpose(0, 1).contiguous().flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_LBD: Tensor) -> tuple[Tensor | None, ...]:
        packed_LBE, turned_LBGN, dt_LBH, A_H, dt_bias_H, cos_LR, sin_LR, document_BL = ctx.saved_tensors
        sizes, heads = ctx.sizes, A_H.shape[0]
        _, backward = _kernels()
        dpacked_LBE, ddt_LBH = torch.empty_like(packed_LBE), torch.empty_like(dt_LBH)
        x_BLHP, BC_BLGN = _x_and_BC(packed_LBE, heads, sizes)
        if turned_LBGN is not None:
            BC_BLGN = turned_LBGN.transpose(0, 1)
        dx_BLHP, dBC_BLGN = _x_and_BC(dpacked_LBE, heads, sizes)
        (B_BLGN, C_BLGN), (dB_BLGN, dC_BLGN) = BC_BLGN.chunk(2, dim=2), dBC_BLGN.chunk(2, dim=2)
        _, _, dA_H, *_ = backward(
            dy_LBD.unflatten(2, (heads, -1)).transpose(0, 1),
            x_BLHP,
            dt_LBH.transpose(0, 1),
            A_H,
            B_BLGN,
            C_BLGN,
            # In place of y, of which only the shape is used.
            x_BLHP,
            sizes.chunk_size,
            seq_idx=document_BL,
            dx=dx_BLHP,
            ddt=ddt_LBH.transpose(0, 1),
            dB=dB_BLGN,
            dC=dC_BLGN,
        )
        _launch(_finish_token, packed_LBE, heads, sizes, dt_bias_H, cos_LR, sin_LR, dpacked_LBE, ddt_LBH)
        ddt_bias_H = None if dt_bias_H is None else ddt_LBH.sum((0, 1))
        return dpacked_LBE, dA_H * A_H, ddt_bias_H, None, None, None, None


def _x_and_BC(packed_LBE: Tensor, heads: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Views: x, and B's groups followed by C's."""
    packed_BLE = packed_LBE.transpose(0, 1)
    start, width = heads * sizes.head_dim, 2 * sizes.groups * sizes.state_size
    x_BLHP = packed_BLE[..., :start].unflatten(-1, (heads, sizes.head_dim))
    return x_BLHP, packed_BLE[..., start : start + width].unflatten(-1, (2 * sizes.groups, sizes.state_size))


def _launch(kernel: Any, packed_LBE: Tensor, heads: int, sizes: Sizes, *tensors: Tensor | None) -> None:
    """One program per token: all its groups share the angles."""
    length, batch, columns = packed_LBE.shape
    start, groups, planes = heads * sizes.head_dim, 2 * sizes.groups, sizes.state_size // 2
    end = start + groups * sizes.state_size
    blocks = {"G": groups, "R": planes, "H": heads, "E": max(columns - end - heads, 1)}
    # Triton launches on the current device.
    with torch.cuda.device_of(packed_LBE):
        kernel[(length * batch,)](
            packed_LBE,
            *tensors,
            *(batch, columns, start, end, groups, planes, heads),
            **{f"BLOCK_{letter}": triton.next_power_of_2(size) for letter, size in blocks.items()},
        )


@triton.jit
def _prepare_token(
    packed,
    A_log,
    dt_bias,
    cos,
    sin,
    turned,
    dt,
    A,
    batch,
    columns,
    start,
    end,
    groups,
    planes,
    heads,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Offsets may exceed 32 bits.
    token = tl.program_id(0).to(tl.int64)
    source = packed + token * columns
    if cos is not None:
        target = turned + token * groups * (2 * planes)
        _turn_groups(source + start, target, cos, sin, 1.0, token // batch, groups, planes, BLOCK_G, BLOCK_R)
    h = tl.arange(0, BLOCK_H)
    raw = _raw_dt(source + end, dt_bias, h, heads)
    # softplus(z) = max(z, 0) + log(1 + u), u = exp(-|z|); the last term corrects the rounding of 1 + u.
    u = tl.exp(-tl.abs(raw))
    total = 1.0 + u
    log1p = tl.log(total) + (u - (total - 1.0)) / total
    tl.store(dt + token * heads + h, tl.maximum(raw, 0.0) + log1p, mask=h < heads)
    if token == 0:
        tl.store(A + h, -tl.exp(tl.load(A_log + h, mask=h < heads, other=0.0).to(tl.float32)), mask=h < heads)


@triton.jit
def _finish_token(
    packed,
    dt_bias,
    cos,
    sin,
    dpacked,
    ddt,
    batch,
    columns,
    start,
    end,
    groups,
    planes,
    heads,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Offsets may exceed 32 bits.
    token = tl.program_id(0).to(tl.int64)
    target = dpacked + token * columns
    if cos is not None:
        place = target + start
        _turn_groups(place, place, cos, sin, -1.0, token // batch, groups, planes, BLOCK_G, BLOCK_R)
    h = tl.arange(0, BLOCK_H)
    raw = _raw_dt(packed + token * columns + end, dt_bias, h, heads)
    gradient = tl.load(ddt + token * heads + h, mask=h < heads, other=0.0) * tl.sigmoid(raw)
    tl.store(target + end + h, gradient.to(dpacked.dtype.element_ty), mask=h < heads)
    # fp32, because the bias's gradient sums over all tokens.
    tl.store(ddt + token * heads + h, gradient, mask=h < heads)
    padding = end + heads + tl.arange(0, BLOCK_E)
    tl.store(target + padding, tl.zeros([BLOCK_E], dpacked.dtype.element_ty), mask=padding < columns)


@triton.jit
def _turn_groups(
    source, target, cos, sin, direction, position, groups, planes, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Rotate all groups of a token, which are adjacent, by the angles of its position; target may be source."""
    g = tl.arange(0, BLOCK_G)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    c = tl.load(cos + position * planes + r, mask=r < planes, other=0.0)
    s = tl.load(sin + position * planes + r, mask=r < planes, other=0.0) * direction
    offset = g * (2 * planes) + r
    turn(source + offset, target + offset, planes, planes, c, s, (g < groups) & (r < planes))


@triton.jit
def _raw_dt(source, dt_bias, h, heads):
    """dt with its bias, before the softplus."""
    raw = tl.load(source + h, mask=h < heads, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + h, mask=h < heads, other=0.0).to(tl.float32)
    return raw
