"""Chunked SSD: quadratic inside a chunk, a recurrence of states between chunks; plain PyTorch with its own backward.

It works on blocks of a few chunks, so that intermediates stay in a CPU's cache. Only the inputs and the state entering
each block are saved for the backward pass, which recomputes the rest.
Source: arXiv:2405.21060, section 6 (block decomposition). The derivation is in ops/README.md, the shape letters in
ssd_blocks.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_txssm.ops.ssd_blocks import CPU_CHUNK_TOKENS, Inputs, Operands, Scratch, blocks, bmm, write_tokens
from megatron_txssm.ops.ssd_reference import accumulation_dtype, number_documents
from megatron_txssm.ops.ssd_traced import ssd_traced
from megatron_txssm.ops.tracing import is_traced


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
    """Same function as `ssd_reference`, at any length: `(y_BLHP in x's dtype, final_state_BHPN in fp32 or fp64)`.

    `chunk_size` (tokens) affects speed, memory and rounding, not the function; on a CPU it is at most 64. `ssd_traced`
    takes over under tracing (tracing.py) and for higher-order derivatives.
    """
    if x_BLHP.device.type == "cpu":
        chunk_size = min(chunk_size, CPU_CHUNK_TOKENS)
    if initial_state is None:
        shape = (x_BLHP.shape[0], *x_BLHP.shape[2:], B_BLGN.shape[-1])
        initial_state = x_BLHP.new_zeros(shape, dtype=accumulation_dtype(x_BLHP))
    if is_traced(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, initial_state, seq_idx):
        options = {"chunk_size": chunk_size, "initial_state": initial_state, "seq_idx": seq_idx}
        return ssd_traced(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, **options)
    return _Ssd.apply(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, initial_state, seq_idx, chunk_size)


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLHP: Tensor,
        dt_BLH: Tensor,
        A_H: Tensor,
        B_BLGN: Tensor,
        C_BLGN: Tensor,
        initial_state_BHPN: Tensor,
        seq_idx_BL: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        chunk_size = min(chunk_size, x_BLHP.shape[1])
        document_BL = None if seq_idx_BL is None else number_documents(seq_idx_BL)
        inputs = Inputs(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, document_BL)
        scratch = Scratch.of(x_BLHP)
        y_BLHP = torch.empty_like(x_BLHP, memory_format=torch.contiguous_format)
        state_BHPN = initial_state_BHPN.to(**scratch.options, copy=True)
        ctx.blocks, entering = list(blocks(x_BLHP, chunk_size)), []
        for block in ctx.blocks:
            entering.append(state_BHPN[block.rows].clone() if not block.first else None)
            operands = Operands(inputs, block, chunk_size, scratch)
            _forward_block(operands, state_BHPN[block.rows], y_BLHP[block.rows, block.tokens])
        ctx.save_for_backward(*inputs, initial_state_BHPN, *entering)
        ctx.chunk_size = chunk_size
        return y_BLHP, state_BHPN

    @staticmethod
    def backward(ctx: Any, dy_BLHP: Tensor, dstate_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, document_BL, initial_state_BHPN, *entering = ctx.saved_tensors
        # Grad mode is on if the gradient itself will be differentiated.
        if torch.is_grad_enabled() or is_traced(dy_BLHP, dstate_BHPN):
            return _traced_backward(ctx, dy_BLHP, dstate_BHPN)
        inputs = Inputs(x, dt, A, B, C, document_BL)
        scratch = Scratch.of(x)
        dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
        dA_H = torch.zeros_like(A, dtype=torch.float64)
        dstate_BHPN = dstate_BHPN.to(**scratch.options, copy=True)
        for block, entering_BHPN in reversed(list(zip(ctx.blocks, entering, strict=True))):
            operands = Operands(inputs, block, ctx.chunk_size, scratch)
            if entering_BHPN is None:
                entering_BHPN = initial_state_BHPN[block.rows]
            entering_BCHPN = operands.entering_states(entering_BHPN.to(**scratch.options, copy=True))
            of_block = _backward_block(operands, entering_BCHPN, dstate_BHPN[block.rows], dy_BLHP)
            here = (block.rows, block.tokens)
            write_tokens(dx[here], of_block.dx_BCQGKP)
            write_tokens(ddt[here], of_block.ddt_BCQH + of_block.dlog_BCQH * A.double())
            write_tokens(dB[here], of_block.dB_BCQGN)
            write_tokens(dC[here], of_block.dC_BCQGN)
            dA_H += (of_block.dlog_BCQH * operands.dt_BCQH).sum((0, 1, 2))
        return dx, ddt, dA_H.to(A.dtype), dB, dC, dstate_BHPN.to(initial_state_BHPN.dtype), None, None


def _traced_backward(ctx: Any, dy_BLHP: Tensor, dstate_BHPN: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by plain operators, which are themselves differentiable."""
    x, dt, A, B, C, document_BL, initial_state_BHPN, *_ = ctx.saved_tensors
    inputs = (x, dt, A, B, C, initial_state_BHPN)
    with torch.enable_grad():
        outputs = ssd_traced(
            x, dt, A, B, C, chunk_size=ctx.chunk_size, initial_state=initial_state_BHPN, seq_idx=document_BL
        )
    wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(outputs, wanted, (dy_BLHP, dstate_BHPN), create_graph=torch.is_grad_enabled()))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[: len(inputs)]), None, None


def _forward_block(operands: Operands, state_BHPN: Tensor, y_BLHP: Tensor) -> None:
    """Writes `y_BLHP`; updates `state_BHPN` to the state after the block."""
    B, C, Q, G, K, P, _ = operands.sizes
    scratch, by_group = operands.scratch, operands.by_group
    # Inside a chunk: masked attention. Scores belong to a group and decays to a head, so B and C are never repeated.
    weights_BCHQS = operands.source_to_reader_BCHQS
    weights_BCHQS.unflatten(2, (G, K)).mul_(operands.scores()[:, :, :, None])
    y_inside_BCHQP = bmm(weights_BCHQS, operands.dtx_BCHSP, scratch("y", B, C, G * K, Q, P))
    # Readers' share of the state entering their chunk: one GEMM per group, whose heads share C.
    entering_BCHPN = operands.entering_states(state_BHPN)
    states_BCGKPN = entering_BCHPN.unflatten(2, (G, K)).flatten(3, 4)
    y_entering_BCGQKP = operands.group_buffer("by group")
    bmm(operands.C_BCGQN, states_BCGKPN.mT, y_entering_BCGQKP.flatten(4))
    decays_BCGQK1 = by_group(operands.start_to_reader_BCHQ[..., None])
    y_BCGQKP = y_entering_BCGQKP.mul_(decays_BCGQK1).add_(by_group(y_inside_BCHQP))
    write_tokens(y_BLHP, y_BCGQKP.transpose(2, 3))


class _BlockGradients(NamedTuple):
    """Gradients of a block's inputs; the next block overwrites those in `scratch`."""

    dx_BCQGKP: Tensor
    # Through x·dt; the part through the decays is in dlog.
    ddt_BCQH: Tensor
    # Of each token's own log decay, dt·A.
    dlog_BCQH: Tensor
    dB_BCQGN: Tensor
    dC_BCQGN: Tensor


def _backward_block(
    operands: Operands, entering_BCHPN: Tensor, dstate_BHPN: Tensor, dy_BLHP: Tensor
) -> _BlockGradients:
    """Updates `dstate_BHPN` from the gradient of the state after the block to that of the state before it."""
    B, C, Q, G, K, P, _ = operands.sizes
    dy_BCHQP = operands.scratch("dy", B, C, G * K, Q, P)
    dy_BCHQP.copy_(operands.chunked(dy_BLHP).transpose(2, 3))
    dentering_BCHPN, dC_BCGQN, dread_BCHQ = _through_readers(operands, entering_BCHPN, dy_BCHQP)
    dend_BCH = _through_states(operands, entering_BCHPN, dentering_BCHPN, dstate_BHPN)
    ddtx_BCGSKP, dB_BCGSN, dadd_BCHS = _through_sources(operands, dentering_BCHPN)
    dpath_BCHQ = _through_pairs(operands, dy_BCHQP, ddtx_BCGSKP, dB_BCGSN, dC_BCGQN)

    # A token's dt·A is on every path across it: from a source before it to a reader at or after it.
    dpath_BCHQ += dread_BCHQ
    dpath_BCHQ -= dadd_BCHS
    dthrough_BCH1 = dadd_BCHS.sum(-1, keepdim=True) + (dend_BCH * operands.start_to_end_BCH)[..., None]
    dlog_BCHQ = dpath_BCHQ.flip(-1).cumsum(-1).flip(-1) + dthrough_BCH1

    ddtx_BCQGKP = ddtx_BCGSKP.transpose(2, 3)
    x_BCQGKP = operands.x_BCQHP.unflatten(3, (G, K))
    ddt_BCQGK = torch.mul(ddtx_BCQGKP, x_BCQGKP, out=operands.scratch("y", B, C, Q, G, K, P)).sum(-1)
    dx_BCQGKP = ddtx_BCQGKP.mul_(operands.dt_BCQH.unflatten(3, (G, K))[..., None])
    return _BlockGradients(
        dx_BCQGKP, ddt_BCQGK.flatten(3), dlog_BCHQ.transpose(2, 3), dB_BCGSN.transpose(2, 3), dC_BCGQN.transpose(2, 3)
    )


def _through_readers(operands: Operands, entering_BCHPN: Tensor, dy_BCHQP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the states entering the chunks, of C, and of each reader's log decay."""
    B, C, Q, G, K, P, N = operands.sizes
    scratch, by_group = operands.scratch, operands.by_group
    read_BCGQKP = operands.group_buffer("by group")
    torch.mul(by_group(dy_BCHQP), by_group(operands.start_to_reader_BCHQ[..., None]), out=read_BCGQKP)
    dentering_BCGKPN = scratch("added", B, C, G, K * P, N)
    bmm(read_BCGQKP.flatten(4).mT, operands.C_BCGQN, dentering_BCGKPN)
    # Per head, because each head's decay has a gradient.
    dC_BCHQN = bmm(dy_BCHQP, entering_BCHPN, scratch("by head", B, C, G * K, Q, N))
    dC_BCGQN, dread_BCHQ = _over_heads(
        dC_BCHQN, operands.C_BCGQN, operands.start_to_reader_BCHQ, scratch("dC", B, C, G, Q, N)
    )
    return dentering_BCGKPN.view(B, C, G * K, P, N), dC_BCGQN, dread_BCHQ


def _through_states(operands: Operands, entering_BCHPN: Tensor, dentering_BCHPN: Tensor, dstate_BHPN: Tensor) -> Tensor:
    """From the last chunk to the first; returns the gradient of each chunk's decay, [B, C, H].

    Updates `dstate_BHPN` to the gradient of the state before the block, `dentering_BCHPN` to that of each chunk's
    added state.
    """
    dend_BCH = torch.empty_like(operands.start_to_end_BCH)
    behind_BHPN = operands.scratch("state", *dstate_BHPN.shape)
    for chunk in reversed(range(dend_BCH.shape[1])):
        behind_BHPN.copy_(dstate_BHPN)
        decay_BH11 = operands.start_to_end_BCH[:, chunk, :, None, None]
        dstate_BHPN.mul_(decay_BH11).add_(dentering_BCHPN[:, chunk])
        dentering_BCHPN[:, chunk].copy_(behind_BHPN)
        dend_BCH[:, chunk] = behind_BHPN.mul_(entering_BCHPN[:, chunk]).sum((-2, -1))
    return dend_BCH


def _through_sources(operands: Operands, dadded_BCHPN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of dt·x, of B, and of each source's log decay, through the states that the chunks add."""
    B, C, Q, G, K, _, N = operands.sizes
    dB_BCHSN = bmm(operands.dtx_BCHSP, dadded_BCHPN, operands.scratch("by head", B, C, G * K, Q, N))
    dB_BCGSN, dadd_BCHS = _over_heads(
        dB_BCHSN, operands.B_BCGSN, operands.source_to_end_BCHS, operands.scratch("dB", B, C, G, Q, N)
    )
    ddtx_BCGSKP = operands.group_buffer("by group")
    bmm(operands.B_BCGSN, dadded_BCHPN.unflatten(2, (G, K)).flatten(3, 4).mT, ddtx_BCGSKP.flatten(4))
    ddtx_BCGSKP.mul_(operands.by_group(operands.source_to_end_BCHS[..., None]))
    return ddtx_BCGSKP, dB_BCGSN, dadd_BCHS


def _through_pairs(
    operands: Operands, dy_BCHQP: Tensor, ddtx_BCGSKP: Tensor, dB_BCGSN: Tensor, dC_BCGQN: Tensor
) -> Tensor:
    """Adds the part through the pairs inside a chunk to the gradients of dt·x, B and C.

    Returns, for each token, the gradients of its paths' log decays as a reader minus those as a source, [B, C, H, Q].
    Both sums are fp64 sums of the same numbers, because rows cancel against columns.
    """
    B, C, Q, G, K, P, N = operands.sizes
    H, scratch = G * K, operands.scratch
    decays_BCHQS = operands.source_to_reader_BCHQS
    weights_BCHQS = scratch("weights", B, C, H, Q, Q)
    scores_BCG1QS = operands.scores()[:, :, :, None]
    torch.mul(decays_BCHQS.unflatten(2, (G, K)), scores_BCG1QS, out=weights_BCHQS.view(B, C, G, K, Q, Q))
    ddtx_BCHSP = bmm(weights_BCHQS.mT, dy_BCHQP, scratch("y", B, C, H, Q, P))
    ddtx_BCGSKP.add_(operands.by_group(ddtx_BCHSP))
    dweights_BCHQS = bmm(dy_BCHQP, operands.dtx_BCHSP.mT, scratch("dweights", B, C, H, Q, Q))
    dpairs_BCHQS = weights_BCHQS.mul_(dweights_BCHQS)
    dscores_BCGQS = scratch("scores", B, C, G, Q, Q)
    torch.sum(dweights_BCHQS.mul_(decays_BCHQS).unflatten(2, (G, K)), 3, out=dscores_BCGQS)
    dscores = dscores_BCGQS.view(-1, Q, Q)
    dC_BCGQN.view(-1, Q, N).baddbmm_(dscores, operands.B_BCGSN.view(-1, Q, N))
    dB_BCGSN.view(-1, Q, N).baddbmm_(dscores.mT, operands.C_BCGQN.view(-1, Q, N))
    exact_BCHQS = scratch("exact", B, C, H, Q, Q, dtype=torch.float64).copy_(dpairs_BCHQS)
    return exact_BCHQS.sum(-1) - exact_BCHQS.sum(-2)


def _over_heads(
    of_heads_BCHQN: Tensor, of_group_BCGQN: Tensor, decay_BCHQ: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """A GEMM's per-head result before decay -> the group's gradient, and that of each log decay."""
    of_heads_BCHQN.mul_(decay_BCHQ[..., None])
    of_heads_BCGKQN = of_heads_BCHQN.unflatten(2, (of_group_BCGQN.shape[2], -1))
    torch.sum(of_heads_BCGKQN, 3, out=out)
    dlog_BCGKQ = of_heads_BCGKQN.mul_(of_group_BCGQN[:, :, :, None]).sum(-1).double()
    return out, dlog_BCGKQ.flatten(2, 3)
