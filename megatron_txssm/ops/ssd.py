"""The state-space operator that the model calls: one signature, an explicit backend, checked shapes."""

# B=batch L=sequence H=heads P=head dim G=groups N=state

import torch
from torch import Tensor

from megatron_txssm.ops.ssd_reference import ssd_reference
from megatron_txssm.ops.ssd_reference import ssd_step as reference_step
from megatron_txssm.ops.ssd_torch import ssd_torch
from megatron_txssm.ops.ssd_triton import import_error, is_available, ssd_step_triton, ssd_triton
from megatron_txssm.ops.tracing import is_traced

# "auto": triton if available and not traced, otherwise torch.
BACKENDS = ("auto", "reference", "torch", "triton")


def ssd(
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
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ, y_t = h_t C_t [+ D x_t]: returns `(y_BLHP, final_state_BHPN)`.

    x_BLHP:         the values; y has their dtype.
    dt_BLH:         step sizes after softplus, > 0.
    A_H:            decay rates, < 0.
    B_BLGN, C_BLGN: input and output directions, already rotated; head h reads group h // (H / G).
    chunk_size:     tokens; affects speed and memory (README.md), not the function.
    D_H:            the skip connection from x to y.
    initial_state:  BHPN, the state of token 0's document before token 0; zero if absent.
    seq_idx:        BL integers, the number of each token's document; the state restarts from zero where it changes.

    The final state is fp32 (fp64 for fp64 inputs) for any dtype of x, because it keeps accumulating.
    """
    backend = _chosen(backend, x_BLHP)
    _check_shapes(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, chunk_size, D_H, initial_state, seq_idx)
    inputs, options = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN), {"initial_state": initial_state, "seq_idx": seq_idx}
    if backend == "triton":
        return ssd_triton(*inputs, chunk_size=chunk_size, D_H=D_H, **options)
    if backend == "reference":
        y_BLHP, state_BHPN = ssd_reference(*inputs, **options)
    else:
        y_BLHP, state_BHPN = ssd_torch(*inputs, chunk_size=chunk_size, **options)
    return _passed_by(y_BLHP, x_BLHP, D_H), state_BHPN


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    state_BHPN: Tensor,
    *,
    D_H: Tensor | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """One decoding step: `(y_BHP in x's dtype, the new state_BHPN)`; shapes as in `ssd`, without L."""
    inputs = (x_BHP, dt_BH, A_H, B_BGN, C_BGN, state_BHPN)
    # The kernel has no backward.
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, D_H))
    if _chosen(backend, x_BHP) == "triton" and not differentiated:
        return ssd_step_triton(*inputs, D_H=D_H)
    y_BHP, state_BHPN = reference_step(*inputs)
    return _passed_by(y_BHP, x_BHP, D_H), state_BHPN


def is_fused(backend: str, x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether fused kernels (mamba-ssm's or ours) can replace the operators around `ssd`: selected, and able to run."""
    if _chosen(backend, x) != "triton" or x.dtype == torch.float64 or is_traced(x, *parameters):
        return False
    return import_error() is None


def _passed_by(y: Tensor, x: Tensor, D_H: Tensor | None) -> Tensor:
    return y if D_H is None else y + (D_H[:, None] * x).to(y.dtype)


def _chosen(backend: str, x: Tensor) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not an SSD backend; use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        # Compilers and function transforms cannot see into a kernel.
        return "triton" if is_available(x) and not is_traced(x) else "torch"
    return backend


def _check_shapes(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    chunk_size: int,
    D_H: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    if x_BLHP.dim() != 4 or x_BLHP.shape[1] == 0:
        raise ValueError(f"x.shape={list(x_BLHP.shape)} is not [batch, length > 0, heads, head_dim]; reshape x")
    batch, length, heads, head_dim = x_BLHP.shape
    if B_BLGN.dim() != 4:
        raise ValueError(f"B.shape={list(B_BLGN.shape)} is not [batch, length, groups, state]; reshape B")
    groups, state_dim = B_BLGN.shape[2:]
    if groups == 0 or heads % groups:
        legal = ", ".join(str(g) for g in range(1, heads + 1) if heads % g == 0)
        raise ValueError(f"groups={groups} does not divide heads={heads}; use one of {legal}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not positive; use 64 to 256 tokens")

    expected = {
        "dt": (dt_BLH, (batch, length, heads)),
        "A": (A_H, (heads,)),
        "B": (B_BLGN, (batch, length, groups, state_dim)),
        "C": (C_BLGN, (batch, length, groups, state_dim)),
        "D": (D_H, (heads,)),
        "initial_state": (initial_state, (batch, heads, head_dim, state_dim)),
        "seq_idx": (seq_idx, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name}.shape={list(tensor.shape)} does not fit x.shape={list(x_BLHP.shape)} and "
                f"B.shape={list(B_BLGN.shape)}; use {list(shape)}"
            )
    if seq_idx is not None and seq_idx.is_floating_point():
        raise ValueError(f"seq_idx.dtype={seq_idx.dtype} cannot number documents; use torch.int32 or torch.int64")
