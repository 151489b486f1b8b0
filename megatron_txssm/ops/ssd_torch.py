"""SSD in chunks: quadratic inside a chunk, a recurrence of states between chunks; plain PyTorch, plain autograd.

Source: arXiv:2405.21060, section 6 (block decomposition). The derivation is in ops/README.md.
"""

# B=batch L=sequence H=heads=G·K P=head dim G=groups K=heads per group N=state C=chunks Q=chunk length
# S=chunk length too: where tokens are paired, Q counts the readers (rows of C) and S the sources (rows of B and x)

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_txssm.ops.ssd_reference import accumulation_dtype


class _Decays(NamedTuple):
    """The share, in [0, 1], that survives on each path through a chunk; 0 where a document starts on the way."""

    source_to_reader_BCHQS: Tensor
    source_to_end_BCHS: Tensor
    start_to_reader_BCHQ: Tensor
    start_to_end_BCH: Tensor


def ssd_torch(
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
    """The function of `ssd_reference`, at any length: `(y_BLHP in x's type, final_state_BHPN in fp32 or fp64)`.

    `chunk_size` (tokens) changes speed, memory and rounding, never the function.
    """
    dtype = accumulation_dtype(x_BLHP)
    batch, length, heads, head_dim = x_BLHP.shape
    groups, state_dim = B_BLGN.shape[2:]
    heads_GK = (groups, heads // groups)
    chunk_size = min(chunk_size, length)

    dt_BCSH = _into_chunks(dt_BLH.to(dtype), chunk_size)
    dtx_BCSHP = _into_chunks(x_BLHP.to(dtype), chunk_size) * dt_BCSH[..., None]
    B_BCGSN = _into_chunks(B_BLGN.to(dtype), chunk_size).transpose(2, 3)
    C_BCGQN = _into_chunks(C_BLGN.to(dtype), chunk_size).transpose(2, 3)
    decays = _decays(dt_BCSH, A_H, _documents(seq_idx, dt_BLH, chunk_size))

    # Inside a chunk: masked attention. Scores belong to a group and decays to a head, so B and C are never repeated.
    scores_BCGQS = C_BCGQN @ B_BCGSN.transpose(-1, -2)
    weights_BCGKQS = scores_BCGQS[:, :, :, None] * decays.source_to_reader_BCHQS.unflatten(2, heads_GK)
    y_inside_BCGKQP = weights_BCGKQS @ dtx_BCSHP.unflatten(3, heads_GK).permute(0, 1, 3, 4, 2, 5)

    # What a chunk adds to the state at its end. The heads of a group share one GEMM with their common B.
    dtx_at_end_BCSHP = dtx_BCSHP * decays.source_to_end_BCHS.transpose(2, 3)[..., None]
    dtx_at_end_BCGKPS = dtx_at_end_BCSHP.unflatten(3, heads_GK).permute(0, 1, 3, 4, 5, 2)
    added_BCHPN = (dtx_at_end_BCGKPS.flatten(3, 4) @ B_BCGSN).unflatten(3, (-1, head_dim)).flatten(2, 3)

    if initial_state is None:
        initial_state = added_BCHPN.new_zeros(batch, heads, head_dim, state_dim)
    entering_BCHPN, final_state_BHPN = _pass_states(initial_state.to(dtype), decays.start_to_end_BCH, added_BCHPN)

    # What the readers of a chunk see of the state that enters it; again one GEMM per group, with their common C.
    entering_BCGKPN = entering_BCHPN.unflatten(2, heads_GK)
    y_entering_BCGQKP = (C_BCGQN @ entering_BCGKPN.flatten(3, 4).transpose(-1, -2)).unflatten(4, (-1, head_dim))
    start_to_reader_BCGQK = decays.start_to_reader_BCHQ.unflatten(2, heads_GK).transpose(3, 4)

    y_BCGQKP = torch.addcmul(y_inside_BCGKQP.transpose(3, 4), start_to_reader_BCGQK[..., None], y_entering_BCGQKP)
    y_BLHP = y_BCGQKP.transpose(2, 3).reshape(batch, -1, heads, head_dim)[:, :length]
    return y_BLHP.to(x_BLHP.dtype), final_state_BHPN


def _into_chunks(t_BL: Tensor, chunk_size: int) -> Tensor:
    """[B, L, ...] -> [B, C, Q, ...], zeros after the end.

    A padded token has dt = 0: it decays nothing and adds nothing, so the final state is that of the last real token.
    """
    padding = -t_BL.shape[1] % chunk_size
    if padding:
        t_BL = F.pad(t_BL, (0, 0) * (t_BL.dim() - 2) + (0, padding))
    return t_BL.unflatten(1, (-1, chunk_size))


def _documents(seq_idx: Tensor | None, dt_BLH: Tensor, chunk_size: int) -> Tensor:
    """Counts the changes of `seq_idx` up to each token, [B, C, Q]; padding continues the last document.

    The count, unlike seq_idx itself, never returns to an earlier value: equal counts mean no reset in between.
    """
    starts_BL = torch.zeros(dt_BLH.shape[:2], dtype=torch.bool, device=dt_BLH.device)
    if seq_idx is not None:
        starts_BL[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    padding = -starts_BL.shape[1] % chunk_size
    return F.pad(starts_BL, (0, padding)).cumsum(1).unflatten(1, (-1, chunk_size))


def _decays(dt_BCSH: Tensor, A_H: Tensor, document_BCQ: Tensor) -> _Decays:
    """exp(sum of dt·A) along the paths of one chunk.

    The sums are differences of prefix sums. Near the diagonal these cancel (A = -16, dt = 0.1, 256 tokens: -1.6 as the
    difference of two numbers near -400), and in the backward pass row sums cancel against column sums. Hence the
    logarithms, a small part of the work, are fp64, and only their exponentials have the type of the rest.
    """

    # Logarithms are masked before exp: exp(-inf) is 0 with gradient 0, where a mask after exp could meet 0·inf.
    def masked_exp(log: Tensor, keep: Tensor) -> Tensor:
        return log.to(dt_BCSH.dtype).masked_fill(~keep, float("-inf")).exp_()

    log_BCHQ = (dt_BCSH.double() * A_H.double()).cumsum(2).transpose(2, 3)
    document_BC1Q = document_BCQ[:, :, None]
    last_BC1 = document_BC1Q[..., -1]
    # Token 0 continues the document of the initial state, whose count is 0.
    previous_BC1 = F.pad(last_BC1[:, :-1], (0, 0, 1, 0))
    same_document_BC1QS = document_BC1Q[..., :, None] == document_BC1Q[..., None, :]
    return _Decays(
        masked_exp(log_BCHQ[..., :, None] - log_BCHQ[..., None, :], same_document_BC1QS.tril()),
        masked_exp(log_BCHQ[..., -1:] - log_BCHQ, document_BC1Q == last_BC1[..., None]),
        masked_exp(log_BCHQ, document_BC1Q == previous_BC1[..., None]),
        masked_exp(log_BCHQ[..., -1], last_BC1 == previous_BC1),
    )


def _pass_states(state_BHPN: Tensor, decay_BCH: Tensor, added_BCHPN: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence between chunks: the state that enters each chunk, and the one that leaves the last.

    A loop of C small steps: as a GEMM with a C×C matrix of decays it is slower and grows with C².
    """
    entering = []
    for decay_BH, added_BHPN in zip(decay_BCH.unbind(1), added_BCHPN.unbind(1), strict=True):
        entering.append(state_BHPN)
        state_BHPN = torch.addcmul(added_BHPN, decay_BH[..., None, None], state_BHPN)
    return torch.stack(entering, dim=1), state_BHPN
