"""The state-space scan of a sequence that may be divided over context-parallel ranks and packed with documents.

B=batch  L=length on this rank  H=heads  P=head dim  G=groups  N=state size; b, l: see context_parallel.py
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.ops.ssd import ssd
from megatron_txssm.ops.state_passing import read_entering_state, surviving_share


def scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    state_space: StateSpaceConfig,
    zigzag: Zigzag,
    D_H: Tensor | None = None,
    document_BL: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`ssd` of the whole sequence, for this rank's tokens: `(y_BLHP, final_state_BHPN)`.

    `document_BL` numbers the documents of the whole sequence. Initial and final states are not supported under context
    parallelism.
    """
    kernel = partial(ssd, chunk_size=state_space.chunk_size, backend=state_space.ssd_backend)
    if zigzag.size == 1:
        return kernel(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H=D_H, initial_state=initial_state, seq_idx=document_BL)
    assert initial_state is None, "decoding does not support context parallelism"
    if state_space.context_parallel_method == "all_to_all":
        x, dt, B, C = (zigzag.heads_for_tokens(t) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
        A_of_heads_H = A_H.unflatten(0, (zigzag.size, -1))[zigzag.rank]
        D_of_heads_H = None if D_H is None else D_H.unflatten(0, (zigzag.size, -1))[zigzag.rank]
        y_BLHP, _ = kernel(x, dt, A_of_heads_H, B, C, D_H=D_of_heads_H, seq_idx=document_BL)
        return zigzag.tokens_for_heads(y_BLHP), None

    x_blHP, dt_blH, B_blGN, C_blGN = (zigzag.fold(t) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
    seq_idx_bl = open_bl = None
    if document_BL is not None:
        seq_idx_bl = zigzag.fold(zigzag.own(document_BL))
        open_bl = seq_idx_bl == documents_before(document_BL, zigzag, 1)
    # Scan every piece from an empty state, then add the entering state: exact, because the scan is linear in the state.
    y_blHP, added_bHPN = kernel(x_blHP, dt_blH, A_H, B_blGN, C_blGN, D_H=D_H, seq_idx=seq_idx_bl)
    share_blH = surviving_share(dt_blH, A_H, open_bl)
    entering_bHPN = zigzag.pass_states(added_bHPN, share_blH[:, -1])
    read_blHP = read_entering_state(share_blH, C_blGN, entering_bHPN)
    return zigzag.unfold(y_blHP + read_blHP.to(y_blHP.dtype)), None


def documents_before(document_BL: Tensor, zigzag: Zigzag, tokens: int) -> Tensor:
    """Documents of the `tokens` tokens before each of this rank's pieces, [b, tokens]; 0 before the first piece."""
    padded_BL = F.pad(document_BL, (tokens, 0))
    starts = [piece.start for piece in zigzag.ranges(document_BL.shape[1] // zigzag.size)]
    return torch.stack([padded_BL[:, start : start + tokens] for start in starts], dim=1).flatten(0, 1)
