"""SSD by mamba-ssm's Triton kernels, with the signatures of `ssd_torch` and `ssd_step`; CUDA only.

Source of the kernels: arXiv:2405.21060. The notes below hold for mamba-ssm 2.3.2.post1, which is imported where a
kernel is called, so that nothing else needs it.

Precision: sums are fp32, but the operands of every product (chunk states, too) are rounded to x's dtype, and on a GPU
fp32 operands are rounded to TF32 unless TRITON_F32_DEFAULT=ieee is set in the environment.

Bitwise reproducibility: torch.use_deterministic_algorithms, which Megatron's `--deterministic-mode` sets, selects
kernels without atomics. Block sizes determine the order of sums. They are fixed only if that mode is on, or
MAMBA_DETERMINISTIC=1 is set in the environment, when mamba-ssm is imported; otherwise they are those that a process on
this machine measured as fastest (TRITON_CACHE_AUTOTUNING).
Megatron imports mamba-ssm before it reads its arguments, so training/pretrain.py sets the variable.
"""

# B=batch L=sequence H=heads P=head dim G=groups N=state

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_txssm.ops.ssd_reference import number_documents

# The largest offset that a kernel can address: it computes index times stride in 32 bits, and overflow is silent
# (mamba issue 1015).
MAX_OFFSET = 2**31 - 1


def is_available(x: Tensor) -> bool:
    """Whether the kernels support `x`: it is on a CUDA device, its dtype is not fp64, and mamba-ssm can be imported."""
    return x.is_cuda and x.dtype != torch.float64 and import_error() is None


def why_unavailable() -> str | None:
    """Why the kernels cannot run in this process; None if they can."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device, and there is none"
    error = import_error()
    if error is not None:
        return f"it needs mamba-ssm, which cannot be imported ({error}): docs/gpu.md says how to install it"
    return None


@functools.cache
def import_error() -> ImportError | None:
    """The error from importing the kernels; None if there is none."""
    try:
        _kernels()
    except ImportError as error:
        # The traceback would keep the callers' objects alive, a data loader among them, and the process would not exit.
        return error.with_traceback(None)
    return None


def _kernels() -> tuple[Any, Any]:
    """mamba-ssm's scan of a sequence, and its single-token step."""
    try:  # transformers requires every unguarded import of an exported model's code.
        from mamba_ssm.ops.triton.selective_state_update import (  # pyright: ignore[reportMissingImports]
            selective_state_update,
        )
        from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
            mamba_chunk_scan_combined,
        )
    except ImportError:
        raise

    return mamba_chunk_scan_combined, selective_state_update


@functools.cache
def has_scan_outside_autograd() -> bool:
    """Whether mamba-ssm has the private functions that ssd_fused_triton.py calls."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import (  # noqa: F401  # pyright: ignore[reportMissingImports]
            _mamba_chunk_scan_combined_bwd,
            _mamba_chunk_scan_combined_fwd,
        )
    except ImportError:
        return False
    return True


def ssd_triton(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    chunk_size: int,
    D_H: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function as `ssd`: `(y_BLHP in x's dtype, final_state_BHPN in fp32)`.

    Any length and any strides. D·x is added before y is rounded.
    """
    if x_BLHP.dtype == torch.float64:
        raise ValueError("x.dtype=torch.float64 is not supported by the kernels; use fp32, bf16 or backend='torch'")
    scan, _ = _require_kernels()
    chunk_size = rounded_chunk_size(chunk_size)
    # The kernels require operands of one dtype.
    B_BLGN, C_BLGN = B_BLGN.to(x_BLHP.dtype), C_BLGN.to(x_BLHP.dtype)
    check_size(x_BLHP, dt_BLH, B_BLGN, C_BLGN, chunk_size)
    y_BLHP, final_state_BHPN = scan(
        x_BLHP,
        dt_BLH,
        A_H,
        B_BLGN,
        C_BLGN,
        chunk_size=chunk_size,
        D=D_H,
        initial_states=initial_state,
        # The kernels give the initial state to documents numbered 0, and a chunk's state to all later tokens with the
        # same number, even across another document.
        seq_idx=None if seq_idx is None else number_documents(seq_idx),
        return_final_states=True,
    )
    return y_BLHP, final_state_BHPN.float()


def ssd_step_triton(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    state_BHPN: Tensor,
    *,
    D_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function as `ssd_step`: `(y_BHP in x's dtype, the new state in fp32)`. The kernel has no backward."""
    _, step = _require_kernels()
    head_dim, state_size = state_BHPN.shape[-2:]
    # The kernel updates the state in place.
    state_BHPN = state_BHPN.float().clone()
    dt_BHP = dt_BH[..., None].expand(-1, -1, head_dim)
    A_HPN = A_H[:, None, None].expand(-1, head_dim, state_size)
    # It reads the strides of the optional D and dt_bias even when they are absent.
    zeros_HP = A_H.new_zeros(()).expand(A_H.shape[0], head_dim)
    D_HP = zeros_HP if D_H is None else D_H[:, None].expand(-1, head_dim)
    y_BHP = step(state_BHPN, x_BHP, dt_BHP, A_HPN, B_BGN, C_BGN, D=D_HP, dt_bias=zeros_HP, dt_softplus=False)
    return y_BHP, state_BHPN


def _require_kernels() -> tuple[Any, Any]:
    if (error := import_error()) is not None:
        raise ImportError(
            f"backend='triton' needs mamba-ssm, which cannot be imported ({error}): docs/gpu.md says how to install it"
        ) from error
    return _kernels()


def rounded_chunk_size(chunk_size: int) -> int:
    """The next power of two, at least 16: the kernels' block size."""
    return max(16, 1 << (chunk_size - 1).bit_length())


def check_size(x_BLHP: Tensor, dt_BLH: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, chunk_size: int) -> None:
    """ValueError if an offset into a tensor, ours or the kernels' own, would overflow."""
    batch, length, heads, head_dim = x_BLHP.shape
    groups, state_size = B_BLGN.shape[2:]
    ours = [(t.shape[0] - 1) * t.stride(0) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN)]
    ours += [(length - 1) * t.stride(1) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN)]
    chunks = -(-length // chunk_size)
    # y, pair scores, chunk states.
    a_chunk = max(chunk_size * heads * head_dim, groups * chunk_size**2, heads * head_dim * state_size)
    if max(*ours, batch * chunks * a_chunk) > MAX_OFFSET:
        raise ValueError(
            f"x.shape={list(x_BLHP.shape)} is more than the kernels can address in 32 bits; "
            "use a smaller micro-batch, more tensor-parallel processes or backend='torch'"
        )
