"""Adds the state h that enters a piece of a sequence to the scan of that piece from an empty state.

    y_t += exp(Σ_{r≤t} dt_r A) h C_t        the fraction exp(Σ_r dt_r A) of h leaves the piece

Source: arXiv:2405.21060, section 8.2 (sequence parallelism). A document that starts in the piece blocks the state.
"""

# B=batch (of pieces) L=length of a piece H=heads P=head dim G=groups K=heads per group N=state

import torch
from torch import Tensor

from megatron_txssm.ops.ssd_reference import accumulation_dtype


def surviving_share(dt_BLH: Tensor, A_H: Tensor, open_BL: Tensor | None) -> Tensor:
    """The fraction of the entering state that survives to each token, [B, L, H], fp32 (fp64 for fp64 inputs).

    `open_BL` marks the tokens of the entering state's document. Logarithms are summed in fp64.
    """
    log_BLH = (dt_BLH.double() * A_H.double()).cumsum(1)
    if open_BL is not None:
        log_BLH = log_BLH.masked_fill(~open_BL[..., None], float("-inf"))
    return log_BLH.exp().to(accumulation_dtype(dt_BLH))


def read_entering_state(share_BLH: Tensor, C_BLGN: Tensor, state_BHPN: Tensor) -> Tensor:
    """The entering state's contribution to y, [B, L, H, P], in the state's dtype."""
    G, head_dim = C_BLGN.shape[2], state_BHPN.shape[2]
    # One GEMM per group: its heads share C.
    state_BGKPN = state_BHPN.unflatten(1, (G, -1)).flatten(2, 3)
    C_BGLN = C_BLGN.to(state_BHPN.dtype).transpose(1, 2)
    # Autocast would round both factors to bf16.
    with torch.autocast(C_BGLN.device.type, enabled=False):
        read_BGLKP = torch.matmul(C_BGLN, state_BGKPN.mT).unflatten(-1, (-1, head_dim))
    return read_BGLKP.transpose(1, 2).flatten(2, 3) * share_BLH[..., None]
