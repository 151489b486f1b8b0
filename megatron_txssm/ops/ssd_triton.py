"""SSD by mamba-ssm's Triton kernels, behind the signatures of `ssd_torch` and `ssd_step`; CUDA only.

Source of the kernels: arXiv:2405.21060; what is said of them here holds for mamba-ssm 2.3.2.post1, which is imported
where a kernel is called, so that nothing else needs it.

Precision: sums are fp32, but the operands of every product are rounded to x's type (chunk states, too), and on a GPU
those of fp32 tensors to TF32, unless TRITON_F32_DEFAULT=ieee is in the environment.

Reproducible bits: kernels that add without atomics are taken under torch.use_deterministic_algorithms, which Megatron's
`--deterministic-mode` sets. The block sizes, which order the sums, are fixed only if that holds, or
MAMBA_DETERMINISTIC=1 is in the environment, when mamba-ssm is imported; else they are those that a process of this
machine found to be the fastest (TRITON_CACHE_AUTOTUNING).
Megatron imports it before it reads its arguments: training/pretrain.py sets the variable.
"""

# B=batch L=sequence H=heads P=head dim G=groups N=state

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_txssm.ops.ssd_reference import number_documents

# What a kernel can address: it multiplies indices and strides in 32 bits and does not notice when they overflow
# (mamba issue 1015).
MAX_OFFSET = 2**31 - 1


def is_available(x: Tensor) -> bool:
    """Whether the kernels can take `x`: it is on a CUDA device and no fp64, and mamba-ssm can be imported."""
    return x.is_cuda and x.dtype != torch.float64 and import_error() is None


def why_unavailable() -> str | None:
    """What keeps the kernels from running in this process; None where nothing does."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device, and there is none"
    error = import_error()
    if error is not None:
        return f"it needs mamba-ssm, which cannot be imported ({error}): docs/gpu.md says how to install it"
    return None


@functools.cache
def import_error() -> ImportError | None:
    """Why the kernels cannot be imported; None where they can."""
    try:
        _kernels()
    except ImportError as error:
        # Its traceback would keep alive what the callers hold: a data loader, without whose end no process ends.
        return error.with_traceback(None)
    return None


def _kernels() -> tuple[Any, Any]:
    """mamba-ssm's scan of a sequence and its step of one token."""
    try:  # So that transformers does not ask for it when it loads an exported model from the Hub.
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
    """Whether mamba-ssm has what ssd_fused_triton.py calls, which is none of its public functions."""
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
    """The function of `ssd`: `(y_BLHP in x's type, final_state_BHPN in fp32)`.

    Any length and any strides. D·x is added before y is rounded.
    """
    if x_BLHP.dtype == torch.float64:
        raise ValueError("x.dtype=torch.float64 is none of the kernels' types; use fp32, bf16 or backend='torch'")
    scan, _ = _require_kernels()
    chunk_size = rounded_chunk_size(chunk_size)
    # They multiply tensors of one type.
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
        # They give the initial state to the documents numbered 0, and a chunk's state to a later chunk's tokens of the
        # same number, whatever stands between them.
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
    """The function of `ssd_step`: `(y_BHP in x's type, the new state in fp32)`. The kernel has no backward."""
    _, step = _require_kernels()
    head_dim, state_size = state_BHPN.shape[-2:]
    # The kernel writes into the state it is given.
    state_BHPN = state_BHPN.float().clone()
    dt_BHP = dt_BH[..., None].expand(-1, -1, head_dim)
    A_HPN = A_H[:, None, None].expand(-1, head_dim, state_size)
    # It asks for the strides of its optional D and dt_bias, absent or not.
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
    """The power of two of at least 16 above it, as the kernels' blocks are."""
    return max(16, 1 << (chunk_size - 1).bit_length())


def check_size(x_BLHP: Tensor, dt_BLH: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, chunk_size: int) -> None:
    """ValueError where an offset in a tensor, ours or the kernels' own, would overflow."""
    batch, length, heads, head_dim = x_BLHP.shape
    groups, state_size = B_BLGN.shape[2:]
    ours = [(t.shape[0] - 1) * t.stride(0) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN)]
    ours += [(length - 1) * t.stride(1) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN)]
    chunks = -(-length // chunk_size)
    # y, the scores of pairs, the states of chunks.
    a_chunk = max(chunk_size * heads * head_dim, groups * chunk_size**2, heads * head_dim * state_size)
    if max(*ours, batch * chunks * a_chunk) > MAX_OFFSET:
        raise ValueError(
            f"x.shape={list(x_BLHP.shape)} is more than the kernels can address in 32 bits; "
            "use a smaller micro-batch, more tensor-parallel processes or backend='torch'"
        )
