"""Shared by the forward and backward pass of `ssd_torch`: blocks of chunks, their buffers and operands.

The derivation is in ops/README.md.
"""

# B=batch (of a block: its rows) L=sequence H=heads=G·K P=head dim G=groups K=heads per group N=state
# C=chunks (of a block) Q=S=chunk length: in pairs of tokens, Q counts the readers (rows of C) and S the sources (rows
# of B and x)

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_txssm.ops.ssd_reference import accumulation_dtype
from megatron_txssm.ops.tracing import is_traced

# On a CPU: the maximum tokens per chunk and per block. Measured with 1 MiB of cache per core (tools/benchmark_ssd.py).
CPU_CHUNK_TOKENS = 64
CPU_BLOCK_TOKENS = 256


class Block(NamedTuple):
    """Some chunks of some rows: the slice of tokens, and how many chunks they fill."""

    rows: slice
    tokens: slice
    chunks: int
    # Whether it is the first block of its rows.
    first: bool


def blocks(x_BLHP: Tensor, chunk_size: int) -> Iterator[Block]:
    """Blocks row by row, left to right; rows shorter than a block share one."""
    batch, length = x_BLHP.shape[:2]
    block_tokens = CPU_BLOCK_TOKENS if x_BLHP.device.type == "cpu" else batch * length
    rows = max(1, block_tokens // length)
    step = max(1, block_tokens // chunk_size) * chunk_size
    for row in range(0, batch, rows):
        for start in range(0, length, step):
            end = min(start + step, length)
            chunks = -(-(end - start) // chunk_size)
            yield Block(slice(row, min(row + rows, batch)), slice(start, end), chunks, start == 0)


class Scratch:
    """Reusable buffers: on a CPU, allocating memory costs more than most of the arithmetic."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.options: Any = {"dtype": dtype, "device": device}
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The named buffer in this shape, uninitialised."""
        size = torch.Size(shape).numel()
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # A tensor created in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                buffer = torch.empty(size, **{**self.options, "dtype": dtype or self.options["dtype"]})
            self.buffers[name] = buffer
        return buffer[:size].view(shape)

    @classmethod
    def of(cls, x: Tensor) -> "Scratch":
        """Buffers for operands like x. On a CPU they are kept between calls: 20 MB at the recipes' sizes."""
        dtype = accumulation_dtype(x)
        if x.device.type != "cpu" or is_traced(x):
            return cls(dtype, x.device)
        kept = _kept_scratch.__dict__
        return kept.setdefault(str(dtype), cls(dtype, x.device))


_kept_scratch = threading.local()


class Inputs(NamedTuple):
    """The operator's inputs; `document_BL` numbers the documents (`ssd_reference.number_documents`)."""

    x_BLHP: Tensor
    dt_BLH: Tensor
    A_H: Tensor
    B_BLGN: Tensor
    C_BLGN: Tensor
    document_BL: Tensor | None


class Operands:
    """A block's operands in both passes: its inputs in GEMM layouts, and the decays along its paths.

    A decay is exp(sum of dt·A), the fraction in [0, 1] that survives; 0 if a document starts on the path. The sums are
    differences of prefix sums, which cancel near the diagonal (A = -16, dt = 0.1, 64 tokens: -1.6 as the difference of
    two numbers near -100). Hence the logarithms, a small part of the work, are fp64.
    """

    def __init__(self, inputs: Inputs, block: Block, chunk_size: int, scratch: Scratch):
        self.chunked = lambda t_BL: _into_chunks(t_BL[block.rows, block.tokens], chunk_size)
        self.x_BCQHP, dt_BCQH = self.chunked(inputs.x_BLHP), self.chunked(inputs.dt_BLH)
        B, C, Q, H, P = self.x_BCQHP.shape
        G, N = inputs.B_BLGN.shape[2:]
        self.sizes = B, C, Q, G, H // G, P, N
        self.scratch = scratch
        self.dt_BCQH = dt_BCQH.to(scratch.options["dtype"])
        self.dtx_BCHSP = scratch("dtx", B, C, H, Q, P)
        torch.mul(self.x_BCQHP.transpose(2, 3), self.dt_BCQH.transpose(2, 3)[..., None], out=self.dtx_BCHSP)
        self.B_BCGSN, self.C_BCGQN = scratch("B", B, C, G, Q, N), scratch("C", B, C, G, Q, N)
        self.B_BCGSN.copy_(self.chunked(inputs.B_BLGN).transpose(2, 3))
        self.C_BCGQN.copy_(self.chunked(inputs.C_BLGN).transpose(2, 3))
        self._decays(inputs, block)

    def _decays(self, inputs: Inputs, block: Block) -> None:
        B, C, Q, G, K, _, _ = self.sizes
        log_BCHQ = (self.dt_BCQH.double() * inputs.A_H.double()).cumsum(2).transpose(2, 3).contiguous()
        dtype = self.scratch.options["dtype"]
        self.source_to_reader_BCHQS = self.scratch("decay", B, C, G * K, Q, Q)
        exact_BCHQS = self.scratch("exact", B, C, G * K, Q, Q, dtype=torch.float64)
        self.source_to_reader_BCHQS.copy_(torch.sub(log_BCHQ[..., :, None], log_BCHQ[..., None, :], out=exact_BCHQS))
        # Above the diagonal exp may overflow; the values are overwritten there, not multiplied.
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
        """[B, C, H, Q, P] -> [B, C, G, Q, K, P]: a group's heads share one GEMM."""
        return t_BCHQP.unflatten(2, self.sizes[3:5]).transpose(3, 4)

    def group_buffer(self, name: str) -> Tensor:
        """A buffer of [B, C, G, Q, K, P]."""
        B, C, Q, G, K, P, _ = self.sizes
        return self.scratch(name, B, C, G, Q, K, P)

    def scores(self) -> Tensor:
        B, C, Q, G, _, _, _ = self.sizes
        return bmm(self.C_BCGQN, self.B_BCGSN.mT, self.scratch("scores", B, C, G, Q, Q))

    def entering_states(self, state_BHPN: Tensor) -> Tensor:
        """The state entering each chunk, [B, C, H, P, N]; updates `state_BHPN` from the block's entry to its exit.

        A loop of a few small steps is faster than a GEMM with a C×C matrix of decays.
        """
        B, C, _, G, K, P, N = self.sizes
        at_end_BCGSKP = self.group_buffer("by group")
        torch.mul(
            self.by_group(self.dtx_BCHSP),
            self.by_group(self.source_to_end_BCHS[..., None]),
            out=at_end_BCGSKP,
        )
        added_BCGKPN = self.scratch("added", B, C, G, K * P, N)
        added_BCHPN = bmm(at_end_BCGSKP.flatten(4).mT, self.B_BCGSN, added_BCGKPN).view(B, C, G * K, P, N)
        entering_BCHPN = self.scratch("entering", B, C, G * K, P, N)
        for chunk in range(C):
            entering_BCHPN[:, chunk].copy_(state_BHPN)
            state_BHPN.mul_(self.start_to_end_BCH[:, chunk, :, None, None]).add_(added_BCHPN[:, chunk])
        return entering_BCHPN


def write_tokens(tokens_BL: Tensor, value_BCQ: Tensor) -> None:
    """Copy [B, C, Q, ...] into [B, L, ...] without the padding; heads may be split into groups in either."""
    B, C, Q = value_BCQ.shape[:3]
    if tokens_BL.shape[1] == C * Q:
        target_BCQ = tokens_BL.unflatten(1, (C, Q))
        if target_BCQ.dim() < value_BCQ.dim():
            target_BCQ = target_BCQ.unflatten(3, value_BCQ.shape[3:5])
        target_BCQ.copy_(value_BCQ)
    else:
        tokens_BL.copy_(value_BCQ.reshape(B, C * Q, *tokens_BL.shape[2:])[:, : tokens_BL.shape[1]])


def bmm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into `out`; the leading dimensions of all three form one batch, without a copy."""
    torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
    return out


def _into_chunks(t_BL: Tensor, chunk_size: int) -> Tensor:
    """[B, L, ...] -> [B, C, Q, ...], zero-padded at the end.

    A padded token has dt = 0: it decays nothing and adds nothing, so the final state is that of the last real token.
    """
    padding = -t_BL.shape[1] % chunk_size
    if padding:
        last_BL = t_BL[:, -1:]
        # Integers are document numbers: the padding belongs to the last document.
        filling = torch.zeros_like(last_BL) if t_BL.is_floating_point() else last_BL
        t_BL = torch.cat([t_BL, *[filling] * padding], dim=1)
    return t_BL.unflatten(1, (-1, chunk_size))
