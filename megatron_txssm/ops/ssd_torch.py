"""SSD in chunks: quadratic inside a chunk, a recurrence of states between chunks; plain PyTorch with its own backward.

Work goes block by block, a few chunks at a time, so that what is computed on the way stays in a CPU's cache; only the
inputs and the state that enters each block are kept for the backward pass, which computes the rest again.
Source: arXiv:2405.21060, section 6 (block decomposition). The derivation is in ops/README.md.
"""

# B=batch (of a block: its rows) L=sequence H=heads=G·K P=head dim G=groups K=heads per group N=state
# C=chunks (of a block) Q=chunk length; S=chunk length too: where tokens are paired, Q counts the readers (rows of C)
# and S the sources (rows of B and x)

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_txssm.ops.ssd_reference import accumulation_dtype

# On a CPU: tokens of a chunk at most, and of a block. Measured on caches of 1 MiB a core (tools/benchmark_ssd.py).
CPU_CHUNK_TOKENS = 64
CPU_BLOCK_TOKENS = 256


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

    `chunk_size` (tokens) changes speed, memory and rounding, never the function; on a CPU it is at most 64. The
    gradient has no gradient of its own.
    """
    if initial_state is None:
        shape = (x_BLHP.shape[0], *x_BLHP.shape[2:], B_BLGN.shape[-1])
        initial_state = x_BLHP.new_zeros(shape, dtype=accumulation_dtype(x_BLHP))
    return _Ssd.apply(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, initial_state, seq_idx, chunk_size)


class _Block(NamedTuple):
    """Some chunks of some rows: where its tokens are, and how many chunks they fill."""

    rows: slice
    tokens: slice
    chunks: int
    # Whether it is the first of its rows.
    first: bool


def _blocks(x_BLHP: Tensor, chunk_size: int) -> Iterator[_Block]:
    """Row by row from left to right; rows that are shorter than a block share one."""
    batch, length = x_BLHP.shape[:2]
    block_tokens = CPU_BLOCK_TOKENS if x_BLHP.device.type == "cpu" else batch * length
    rows = max(1, block_tokens // length)
    step = max(1, block_tokens // chunk_size) * chunk_size
    for row in range(0, batch, rows):
        for start in range(0, length, step):
            end = min(start + step, length)
            chunks = -(-(end - start) // chunk_size)
            yield _Block(slice(row, min(row + rows, batch)), slice(start, end), chunks, start == 0)


class _Scratch:
    """Memory that blocks use one after another: fresh memory costs a CPU more time than most of what is done in it."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.options: Any = {"dtype": dtype, "device": device}
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The buffer of this name, in this shape, with whatever it holds."""
        size = torch.Size(shape).numel()
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # What is made in inference mode could not be written to outside.
            with torch.inference_mode(False):
                buffer = torch.empty(size, **{**self.options, "dtype": dtype or self.options["dtype"]})
            self.buffers[name] = buffer
        return buffer[:size].view(shape)

    @classmethod
    def of(cls, x: Tensor) -> "_Scratch":
        """For operands like x. On a CPU it is kept from call to call, 20 MB at the sizes of the recipes."""
        dtype = accumulation_dtype(x)
        if x.device.type != "cpu":
            return cls(dtype, x.device)
        kept = _kept_scratch.__dict__
        return kept.setdefault(str(dtype), cls(dtype, x.device))


_kept_scratch = threading.local()


class _Operands:
    """What both passes need of a block: its inputs in GEMM layouts, and the decays along its paths.

    A decay is exp(sum of dt·A), the share in [0, 1] that survives; 0 where a document starts on the way. The sums are
    differences of prefix sums, which cancel near the diagonal (A = -16, dt = 0.1, 64 tokens: -1.6 as the difference of
    two numbers near -100). Hence the logarithms, a small part of the work, are fp64.
    """

    def __init__(self, inputs: "_Inputs", block: _Block, chunk_size: int, scratch: _Scratch):
        self.chunked = lambda t_BL: _into_chunks(t_BL[block.rows, block.tokens], chunk_size)
        x_BCQHP, dt_BCQH = self.chunked(inputs.x_BLHP), self.chunked(inputs.dt_BLH)
        B, C, Q, H, P = x_BCQHP.shape
        G, N = inputs.B_BLGN.shape[2:]
        self.sizes = B, C, Q, G, H // G, P, N
        self.scratch = scratch
        self.dt_BCQH = dt_BCQH.to(scratch.options["dtype"])
        self.dtx_BCHSP = scratch("dtx", B, C, H, Q, P)
        torch.mul(x_BCQHP.transpose(2, 3), self.dt_BCQH.transpose(2, 3)[..., None], out=self.dtx_BCHSP)
        self.B_BCGSN, self.C_BCGQN = scratch("B", B, C, G, Q, N), scratch("C", B, C, G, Q, N)
        self.B_BCGSN.copy_(self.chunked(inputs.B_BLGN).transpose(2, 3))
        self.C_BCGQN.copy_(self.chunked(inputs.C_BLGN).transpose(2, 3))
        self._decays(inputs, block)

    def _decays(self, inputs: "_Inputs", block: _Block) -> None:
        B, C, Q, G, K, _, _ = self.sizes
        log_BCHQ = (self.dt_BCQH.double() * inputs.A_H.double()).cumsum(2).transpose(2, 3).contiguous()
        dtype = self.scratch.options["dtype"]
        self.source_to_reader_BCHQS = self.scratch("decay", B, C, G * K, Q, Q)
        exact_BCHQS = self.scratch("exact", B, C, G * K, Q, Q, dtype=torch.float64)
        self.source_to_reader_BCHQS.copy_(torch.sub(log_BCHQ[..., :, None], log_BCHQ[..., None, :], out=exact_BCHQS))
        # Above the diagonal exp may overflow; what it gives there is overwritten, not multiplied.
        self.source_to_reader_BCHQS.exp_().tril_()
        self.source_to_end_BCHS = (log_BCHQ[..., -1:] - log_BCHQ).exp_().to(dtype)
        self.start_to_reader_BCHQ = log_BCHQ.exp().to(dtype)
        self.start_to_end_BCH = log_BCHQ[..., -1].exp().to(dtype)
        if inputs.document_BL is None:
            return
        document_BC1Q = self.chunked(inputs.document_BL)[:, :, None]
        previous_B = inputs.document_BL[block.rows, max(block.tokens.start - 1, 0)]
        last_BC1 = document_BC1Q[..., -1]
        previous_BC1 = torch.cat([previous_B[:, None, None], last_BC1[:, :-1]], dim=1)
        closed_BC1QS = document_BC1Q[..., :, None] != document_BC1Q[..., None, :]
        self.source_to_reader_BCHQS.masked_fill_(closed_BC1QS, 0)
        self.source_to_end_BCHS.masked_fill_(document_BC1Q != last_BC1[..., None], 0)
        self.start_to_reader_BCHQ.masked_fill_(document_BC1Q != previous_BC1[..., None], 0)
        self.start_to_end_BCH.masked_fill_(last_BC1 != previous_BC1, 0)

    def by_group(self, t_BCHQP: Tensor) -> Tensor:
        """[B, C, H, Q, P] -> [B, C, G, Q, K, P]: the layout in which a group's heads share one GEMM."""
        return t_BCHQP.unflatten(2, self.sizes[3:5]).transpose(3, 4)

    def group_buffer(self, name: str) -> Tensor:
        """Memory for that layout."""
        B, C, Q, G, K, P, _ = self.sizes
        return self.scratch(name, B, C, G, Q, K, P)

    def scores(self) -> Tensor:
        B, C, Q, G, _, _, _ = self.sizes
        return _bmm(self.C_BCGQN, self.B_BCGSN.mT, self.scratch("scores", B, C, G, Q, Q))

    def entering_states(self, state_BHPN: Tensor) -> Tensor:
        """The state that enters each chunk, [B, C, H, P, N]; `state_BHPN` enters the block and becomes what leaves it.

        A loop of a few small steps: as a GEMM with a C×C matrix of decays it is slower.
        """
        B, C, _, G, K, P, N = self.sizes
        at_end_BCGSKP = self.group_buffer("by group")
        torch.mul(
            self.by_group(self.dtx_BCHSP),
            self.by_group(self.source_to_end_BCHS[..., None]),
            out=at_end_BCGSKP,
        )
        added_BCGKPN = self.scratch("added", B, C, G, K * P, N)
        added_BCHPN = _bmm(at_end_BCGSKP.flatten(4).mT, self.B_BCGSN, added_BCGKPN).view(B, C, G * K, P, N)
        entering_BCHPN = self.scratch("entering", B, C, G * K, P, N)
        for chunk in range(C):
            entering_BCHPN[:, chunk].copy_(state_BHPN)
            state_BHPN.mul_(self.start_to_end_BCH[:, chunk, :, None, None]).add_(added_BCHPN[:, chunk])
        return entering_BCHPN


class _Inputs(NamedTuple):
    """The operator's inputs; `document_BL` counts the documents' starts up to each token."""

    x_BLHP: Tensor
    dt_BLH: Tensor
    A_H: Tensor
    B_BLGN: Tensor
    C_BLGN: Tensor
    document_BL: Tensor | None


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
        if x_BLHP.device.type == "cpu":
            chunk_size = min(chunk_size, CPU_CHUNK_TOKENS)
        chunk_size = min(chunk_size, x_BLHP.shape[1])
        inputs = _Inputs(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, _documents(seq_idx_BL))
        scratch = _Scratch.of(x_BLHP)
        y_BLHP = torch.empty_like(x_BLHP, memory_format=torch.contiguous_format)
        state_BHPN = initial_state_BHPN.to(**scratch.options, copy=True)
        blocks = list(_blocks(x_BLHP, chunk_size))
        entering = []
        for block in blocks:
            entering.append(state_BHPN[block.rows].clone() if not block.first else None)
            operands = _Operands(inputs, block, chunk_size, scratch)
            _forward_block(operands, state_BHPN[block.rows], y_BLHP[block.rows, block.tokens])
        ctx.save_for_backward(*inputs, initial_state_BHPN, *entering)
        ctx.chunk_size, ctx.blocks = chunk_size, blocks
        return y_BLHP, state_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHP: Tensor, dstate_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, dt, A, B, C, document_BL, initial_state_BHPN, *entering = saved
        inputs = _Inputs(x, dt, A, B, C, document_BL)
        scratch = _Scratch.of(dy_BLHP)
        dx, ddt, dA, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C))
        gradients = _Inputs(dx, ddt, dA, dB, dC, None)
        dA_H = torch.zeros_like(inputs.A_H, dtype=torch.float64)
        dstate_BHPN = dstate_BHPN.to(**scratch.options, copy=True)
        for block, entering_BHPN in reversed(list(zip(ctx.blocks, entering, strict=True))):
            operands = _Operands(inputs, block, ctx.chunk_size, scratch)
            if entering_BHPN is None:
                entering_BHPN = initial_state_BHPN[block.rows]
            state_BHPN = entering_BHPN.to(**scratch.options, copy=True)
            entering_BCHPN = operands.entering_states(state_BHPN)
            dlog_BCQH = _backward_block(
                operands, entering_BCHPN, dstate_BHPN[block.rows], dy_BLHP, inputs, gradients, block
            )
            dA_H += (dlog_BCQH * operands.dt_BCQH).sum((0, 1, 2))
        dinitial = dstate_BHPN.to(initial_state_BHPN.dtype)
        return dx, ddt, dA_H.to(A.dtype), dB, dC, dinitial, None, None


def _forward_block(operands: _Operands, state_BHPN: Tensor, y_BLHP: Tensor) -> None:
    """Writes `y_BLHP`; `state_BHPN` becomes the state behind the block."""
    B, C, Q, G, K, P, _ = operands.sizes
    scratch, by_group = operands.scratch, operands.by_group
    # Inside a chunk: masked attention. Scores belong to a group and decays to a head, so B and C are never repeated.
    weights_BCHQS = operands.source_to_reader_BCHQS
    weights_BCHQS.unflatten(2, (G, K)).mul_(operands.scores()[:, :, :, None])
    y_inside_BCHQP = _bmm(weights_BCHQS, operands.dtx_BCHSP, scratch("y", B, C, G * K, Q, P))
    # What the readers see of the state that enters their chunk: one GEMM per group, with its common C.
    entering_BCHPN = operands.entering_states(state_BHPN)
    states_BCGKPN = entering_BCHPN.unflatten(2, (G, K)).flatten(3, 4)
    y_entering_BCGQKP = operands.group_buffer("by group")
    _bmm(operands.C_BCGQN, states_BCGKPN.mT, y_entering_BCGQKP.flatten(4))
    decays_BCGQK1 = by_group(operands.start_to_reader_BCHQ[..., None])
    y_BCGQKP = y_entering_BCGQKP.mul_(decays_BCGQK1).add_(by_group(y_inside_BCHQP))
    _write(y_BLHP, y_BCGQKP.transpose(2, 3))


def _backward_block(
    operands: _Operands,
    entering_BCHPN: Tensor,
    dstate_BHPN: Tensor,
    dy_BLHP: Tensor,
    inputs: _Inputs,
    gradients: _Inputs,
    block: _Block,
) -> Tensor:
    """Writes the block's `gradients`, of x, dt, B and C; returns that of each token's dt·A, [B, C, Q, H].

    `dstate_BHPN`, of the state behind the block, becomes the gradient of the state before it.
    """
    B, C, Q, G, K, P, N = operands.sizes
    H, scratch, by_group = G * K, operands.scratch, operands.by_group
    dy_BCHQP = scratch("dy", B, C, H, Q, P)
    dy_BCHQP.copy_(operands.chunked(dy_BLHP).transpose(2, 3))

    # Readers of the entering states.
    read_BCGQKP = operands.group_buffer("by group")
    torch.mul(by_group(dy_BCHQP), by_group(operands.start_to_reader_BCHQ[..., None]), out=read_BCGQKP)
    dentering_BCGKPN = scratch("added", B, C, G, K * P, N)
    _bmm(read_BCGQKP.flatten(4).mT, operands.C_BCGQN, dentering_BCGKPN)
    dentering_BCHPN = dentering_BCGKPN.view(B, C, H, P, N)
    # By head, as each head's decay has a gradient.
    dC_BCHQN = _bmm(dy_BCHQP, entering_BCHPN, scratch("by head", B, C, H, Q, N))
    dC_BCGQN, dread_BCHQ = _over_heads(
        dC_BCHQN, operands.C_BCGQN, operands.start_to_reader_BCHQ, scratch("dC", B, C, G, Q, N)
    )

    # The states, backwards: what is left in `dentering` is the gradient of what each chunk adds.
    dend_BCH = torch.empty_like(operands.start_to_end_BCH)
    behind_BHPN = scratch("state", *dstate_BHPN.shape)
    for chunk in reversed(range(C)):
        behind_BHPN.copy_(dstate_BHPN)
        decay_BH11 = operands.start_to_end_BCH[:, chunk, :, None, None]
        dstate_BHPN.mul_(decay_BH11).add_(dentering_BCHPN[:, chunk])
        dentering_BCHPN[:, chunk].copy_(behind_BHPN)
        dend_BCH[:, chunk] = behind_BHPN.mul_(entering_BCHPN[:, chunk]).sum((-2, -1))
    dadded_BCHPN = dentering_BCHPN

    # Sources of the states.
    dB_BCHSN = _bmm(operands.dtx_BCHSP, dadded_BCHPN, scratch("by head", B, C, H, Q, N))
    dB_BCGSN, dadd_BCHS = _over_heads(
        dB_BCHSN, operands.B_BCGSN, operands.source_to_end_BCHS, scratch("dB", B, C, G, Q, N)
    )
    ddtx_BCGSKP = operands.group_buffer("by group")
    _bmm(operands.B_BCGSN, dadded_BCHPN.unflatten(2, (G, K)).flatten(3, 4).mT, ddtx_BCGSKP.flatten(4))
    ddtx_BCGSKP.mul_(by_group(operands.source_to_end_BCHS[..., None]))

    # Pairs inside a chunk.
    weights_BCHQS = scratch("weights", B, C, H, Q, Q)
    decays_BCHQS = operands.source_to_reader_BCHQS
    torch.mul(
        decays_BCHQS.unflatten(2, (G, K)), operands.scores()[:, :, :, None], out=weights_BCHQS.view(B, C, G, K, Q, Q)
    )
    ddtx_BCHSP = _bmm(weights_BCHQS.mT, dy_BCHQP, scratch("y", B, C, H, Q, P))
    ddtx_BCGSKP.add_(by_group(ddtx_BCHSP))
    dweights_BCHQS = _bmm(dy_BCHQP, operands.dtx_BCHSP.mT, scratch("dweights", B, C, H, Q, Q))
    dpairs_BCHQS = weights_BCHQS.mul_(dweights_BCHQS)
    dscores_BCGQS = torch.sum(
        dweights_BCHQS.mul_(decays_BCHQS).unflatten(2, (G, K)), 3, out=scratch("scores", B, C, G, Q, Q)
    )
    dC_BCGQN.view(-1, Q, N).baddbmm_(dscores_BCGQS.view(-1, Q, Q), operands.B_BCGSN.view(-1, Q, N))
    dB_BCGSN.view(-1, Q, N).baddbmm_(dscores_BCGQS.view(-1, Q, Q).mT, operands.C_BCGQN.view(-1, Q, N))

    # A token's dt·A is on every path that crosses it: from a source before it to a reader at or behind it. The sums
    # are fp64 and of the same numbers, as rows cancel against columns.
    exact_BCHQS = scratch("exact", B, C, H, Q, Q, dtype=torch.float64).copy_(dpairs_BCHQS)
    dpath_BCHQ = exact_BCHQS.sum(-1) - exact_BCHQS.sum(-2)
    dpath_BCHQ += dread_BCHQ
    dpath_BCHQ -= dadd_BCHS
    dthrough_BCH1 = dadd_BCHS.sum(-1, keepdim=True) + (dend_BCH * operands.start_to_end_BCH)[..., None]
    dlog_BCHQ = dpath_BCHQ.flip(-1).cumsum(-1).flip(-1) + dthrough_BCH1

    dlog_BCQH = dlog_BCHQ.transpose(2, 3)
    ddtx_BCQGKP = ddtx_BCGSKP.transpose(2, 3)
    x_BCQGKP = operands.chunked(inputs.x_BLHP).unflatten(3, (G, K))
    ddt_BCQGK = torch.mul(ddtx_BCQGKP, x_BCQGKP, out=scratch("y", B, C, Q, G, K, P)).sum(-1)
    here = (block.rows, block.tokens)
    _write(gradients.dt_BLH[here], ddt_BCQGK.flatten(3) + dlog_BCQH * inputs.A_H.double())
    _write(gradients.x_BLHP[here], ddtx_BCQGKP.mul_(operands.dt_BCQH.unflatten(3, (G, K))[..., None]))
    _write(gradients.B_BLGN[here], dB_BCGSN.transpose(2, 3))
    _write(gradients.C_BLGN[here], dC_BCGQN.transpose(2, 3))
    return dlog_BCQH


def _write(tokens_BL: Tensor, value_BCQ: Tensor) -> None:
    """Put [B, C, Q, ...] into [B, L, ...], as far as there are tokens; both may divide the heads into groups or not."""
    B, C, Q = value_BCQ.shape[:3]
    if tokens_BL.shape[1] == C * Q:
        target_BCQ = tokens_BL.unflatten(1, (C, Q))
        if target_BCQ.dim() < value_BCQ.dim():
            target_BCQ = target_BCQ.unflatten(3, value_BCQ.shape[3:5])
        target_BCQ.copy_(value_BCQ)
    else:
        tokens_BL.copy_(value_BCQ.reshape(B, C * Q, *tokens_BL.shape[2:])[:, : tokens_BL.shape[1]])


def _over_heads(
    of_heads_BCHQN: Tensor, of_group_BCGQN: Tensor, decay_BCHQ: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """A GEMM's result by head, not decayed yet -> the group's gradient, and that of the logarithm of each decay."""
    of_heads_BCHQN.mul_(decay_BCHQ[..., None])
    of_heads_BCGKQN = of_heads_BCHQN.unflatten(2, (of_group_BCGQN.shape[2], -1))
    torch.sum(of_heads_BCGKQN, 3, out=out)
    dlog_BCGKQ = of_heads_BCGKQN.mul_(of_group_BCGQN[:, :, :, None]).sum(-1).double()
    return out, dlog_BCGKQ.flatten(2, 3)


def _bmm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into `out`; the leading dimensions of all three are one batch, without a copy."""
    torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
    return out


def _into_chunks(t_BL: Tensor, chunk_size: int) -> Tensor:
    """[B, L, ...] -> [B, C, Q, ...], zeros after the end.

    A padded token has dt = 0: it decays nothing and adds nothing, so the final state is that of the last real token.
    """
    padding = -t_BL.shape[1] % chunk_size
    if padding:
        last_BL = t_BL[:, -1:]
        # Integers number documents, and the last one goes on.
        filling = torch.zeros_like(last_BL) if t_BL.is_floating_point() else last_BL
        t_BL = torch.cat([t_BL, *[filling] * padding], dim=1)
    return t_BL.unflatten(1, (-1, chunk_size))


def _documents(seq_idx: Tensor | None) -> Tensor | None:
    """Counts the changes of `seq_idx` up to each token, [B, L].

    The count, unlike seq_idx itself, never returns to an earlier value: equal counts mean no reset in between.
    """
    if seq_idx is None:
        return None
    starts_BL = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return starts_BL.cumsum(1)
