"""Chunked SSD for compilers: plain operators only, all chunks at once.

`ssd_torch` uses it under tracing (tracing.py). It works with torch.compile, torch.export, vmap, torch.func's jvp and
repeated differentiation. The backward pass recomputes nothing unless the compiler chooses to, so the pairs of all
chunks stay in memory.
Source: arXiv:2405.21060, section 6 and listing 1. The derivation is in ops/README.md.
"""

# B=batch L=sequence H=heads=G·K P=head dim G=groups K=heads per group N=state
# C=chunks Q=chunk length (readers) S=chunk length (sources), as in ssd_blocks.py
# E=C+1 edges: the first chunk's start and every chunk's end; R=the edge that reads

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_txssm.ops.ssd_reference import accumulation_dtype, number_documents


def ssd_traced(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    chunk_size: int,
    initial_state: Tensor,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same function as `ssd_reference`: `(y_BLHP in x's dtype, final_state_BHPN in fp32 or fp64)`."""
    # Autocast would round the operands of matmuls to bf16.
    with torch.autocast(x_BLHP.device.type, enabled=False):
        dtype, length = accumulation_dtype(x_BLHP), x_BLHP.shape[1]
        groups = B_BLGN.shape[2]
        # A padded token has dt = 0: it decays nothing and adds nothing.
        dtx_BLHP = x_BLHP.to(dtype) * dt_BLH.to(dtype)[..., None]
        dtx_BCGKSP = _chunked(dtx_BLHP, chunk_size).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
        B_BCGSN, C_BCGQN = (_chunked(t.to(dtype), chunk_size).transpose(2, 3) for t in (B_BLGN, C_BLGN))
        # Log decays in fp64 (see ssd_blocks.py): from the chunk's start, and from the sequence's.
        log_BCHQ = _chunked(dt_BLH.double() * A_H.double(), chunk_size).cumsum(2).transpose(2, 3)
        edge_BHE = F.pad(log_BCHQ[..., -1].cumsum(1), (0, 0, 1, 0)).transpose(1, 2)

        pairs_BC1QS, end_BC1S, start_BC1Q, edges_B1RE = _open_paths(seq_idx, log_BCHQ, chunk_size)
        by_group = lambda t_BCH: t_BCH.to(dtype).unflatten(2, (groups, -1))  # noqa: E731
        pairs_BCGKQS = by_group(_decay(log_BCHQ[..., :, None] - log_BCHQ[..., None, :], pairs_BC1QS))
        end_BCGKS = by_group(_decay(log_BCHQ[..., -1:] - log_BCHQ, end_BC1S))
        start_BCGKQ = by_group(_decay(log_BCHQ, start_BC1Q))
        edges_BHRE = _decay(edge_BHE[..., :, None] - edge_BHE[..., None, :], edges_B1RE).to(dtype)

        scores_BCGQS = torch.einsum("bcgqn,bcgsn->bcgqs", C_BCGQN, B_BCGSN)
        weights_BCGKQS = pairs_BCGKQS * scores_BCGQS[:, :, :, None]
        inside_BCGKQP = torch.einsum("bcgkqs,bcgksp->bcgkqp", weights_BCGKQS, dtx_BCGKSP)
        at_end_BCGKSP = dtx_BCGKSP * end_BCGKS[..., None]
        added_BCHPN = torch.einsum("bcgksp,bcgsn->bcgkpn", at_end_BCGKSP, B_BCGSN).flatten(2, 3)
        # The states at all edges by one matmul: a loop over chunks would fix the length.
        sources_BEHPN = torch.cat([initial_state.to(dtype)[:, None], added_BCHPN], dim=1)
        states_BRHPN = torch.einsum("bhre,behpn->brhpn", edges_BHRE, sources_BEHPN)
        entering_BCGKPN = states_BRHPN[:, :-1].unflatten(2, (groups, -1))
        read_BCGKQP = torch.einsum("bcgqn,bcgkpn->bcgkqp", C_BCGQN, entering_BCGKPN) * start_BCGKQ[..., None]
        y_BCQHP = (inside_BCGKQP + read_BCGKQP).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)
        return y_BCQHP.flatten(1, 2)[:, :length].to(x_BLHP.dtype), states_BRHPN[:, -1]


def _chunked(t_BL: Tensor, chunk_size: int) -> Tensor:
    """[B, L, ...] -> [B, C, Q, ...], zero-padded at the end."""
    padded_BL = F.pad(t_BL, [0, 0] * (t_BL.dim() - 2) + [0, -t_BL.shape[1] % chunk_size])
    return padded_BL.unflatten(1, (-1, chunk_size))


def _decay(log: Tensor, is_open: Tensor) -> Tensor:
    # On closed paths the logarithm may be large: masking after exp would give a gradient of 0·inf.
    return log.masked_fill(~is_open, float("-inf")).exp()


def _open_paths(seq_idx_BL: Tensor | None, log_BCHQ: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Open paths: source to reader, source to end, start to reader of a chunk; edge to later edge.

    A path is open forwards in time, inside one document; [B or 1, C or 1, 1, …], booleans.
    """
    device = log_BCHQ.device
    token_Q = torch.arange(chunk_size, device=device)
    edge_E = torch.arange(log_BCHQ.shape[1] + 1, device=device)
    pairs_QS, edges_RE = token_Q[:, None] >= token_Q, edge_E[:, None] >= edge_E
    if seq_idx_BL is None:
        always = torch.ones(1, dtype=torch.bool, device=device)
        return pairs_QS, always, always, edges_RE
    document_BL = number_documents(seq_idx_BL)
    document_BL = torch.cat([document_BL, document_BL[:, -1:].expand(-1, -document_BL.shape[1] % chunk_size)], dim=1)
    document_BC1Q = document_BL.unflatten(1, (-1, 1, chunk_size))
    # The initial state belongs to document 0.
    edge_BE = F.pad(document_BC1Q[:, :, 0, -1], (1, 0))
    return (
        pairs_QS & (document_BC1Q[..., :, None] == document_BC1Q[..., None, :]),
        document_BC1Q == edge_BE[:, 1:, None, None],
        document_BC1Q == edge_BE[:, :-1, None, None],
        (edges_RE & (edge_BE[:, :, None] == edge_BE[:, None, :]))[:, None],
    )
