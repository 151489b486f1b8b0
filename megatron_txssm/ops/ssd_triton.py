"""SSD by mamba-ssm's Triton kernels, behind the signatures of `ssd_torch` and `ssd_step`; CUDA only.

Source of the kernels: arXiv:2405.21060. mamba-ssm is imported where a kernel is called, so that nothing else needs it.
"""

# B=batch L=sequence H=heads P=head dim G=groups N=state

import functools
import importlib.util

from torch import Tensor


def is_available(x: Tensor) -> bool:
    """Whether the kernels can take `x`: it is on a CUDA device, and mamba-ssm is installed."""
    return x.is_cuda and _is_installed()


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("mamba_ssm") is not None


def ssd_triton(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    chunk_size: int,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The function of `ssd_reference`: `(y_BLHP in x's type, final_state_BHPN in fp32)`."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
            mamba_chunk_scan_combined,
        )
    except ImportError as error:
        raise ImportError(
            "backend='triton' needs mamba-ssm: pip install mamba-ssm (see requirements-gpu.txt)"
        ) from error
    y_BLHP, final_state_BHPN = mamba_chunk_scan_combined(
        x_BLHP,
        dt_BLH,
        A_H,
        B_BLGN,
        C_BLGN,
        chunk_size=chunk_size,
        initial_states=initial_state,
        seq_idx=None if seq_idx is None else seq_idx.int().contiguous(),
        return_final_states=True,
    )
    return y_BLHP, final_state_BHPN.float()


def ssd_step_triton(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The function of `ssd_step`: `(y_BHP in x's type, the new state in fp32)`."""
    from mamba_ssm.ops.triton.selective_state_update import (  # pyright: ignore[reportMissingImports]
        selective_state_update,
    )

    head_dim, state_size = state_BHPN.shape[-2:]
    # The kernel writes into the state it is given.
    state_BHPN = state_BHPN.float().clone()
    dt_BHP = dt_BH[..., None].expand(-1, -1, head_dim)
    A_HPN = A_H[:, None, None].expand(-1, head_dim, state_size)
    y_BHP = selective_state_update(state_BHPN, x_BHP, dt_BHP, A_HPN, B_BGN, C_BGN, dt_softplus=False)
    return y_BHP, state_BHPN
