"""Packed documents in core attention: both implementations against each document alone, on one rank and two."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.model.document_attention import isolating
from megatron_txssm.model.documents import PackedDocuments
from megatron_txssm.model.local_modules import ScaledDotProductAttention
from tests.support.ranks import model_parallel, run_ranks
from tests.support.tiny_model import relative_error, transformer_config

# Documents that end inside a piece or at its edge (pieces at CP2 have 6 tokens), of one token, longer than a piece.
ROWS = ([5, 1, 18], [6, 6, 12], [24], [11, 13])
LENGTH, HEADS, GROUPS, HEAD_DIM = 24, 4, 2, 8
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS])


class UnequalSequences(torch.nn.Module):
    """Computes what Transformer Engine's kernels do, in place of Megatron's TEDotProductAttention."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        _, mask_type, _, packed = rest
        assert isinstance(packed, PackedSeqParams) and packed.qkv_format == "thd" and packed.local_cp_size == 1
        assert mask_type.name == "padding_causal_bottom_right"
        ends_q, ends_kv = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_kv.tolist()
        assert ends_q[-1] == len(query) and ends_kv[-1] == len(key)
        outputs = []
        for (q0, q1), (k0, k1) in zip(pairwise(ends_q), pairwise(ends_kv), strict=True):
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
            q, k, v = (t.transpose(0, 1)[None] for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, GROUPS, GROUPS)
    return [torch.randn(LENGTH, len(ROWS), h, HEAD_DIM, generator=generator).requires_grad_() for h in heads]


def cotangent() -> Tensor:
    return torch.randn(LENGTH, len(ROWS), HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1))


def alone() -> tuple[Tensor, ...]:
    """Output and gradients, each document computed alone."""
    query, key, value = leaves = inputs()
    rows = []
    for row, lengths in enumerate(ROWS):
        parts = [t[:, row : row + 1].permute(1, 2, 0, 3).split(lengths, dim=2) for t in (query, key, value)]
        documents = [
            F.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in zip(*parts, strict=True)
        ]
        rows.append(torch.cat(documents, dim=2).permute(2, 0, 1, 3).flatten(2))
    output = torch.cat(rows, dim=1)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent())


def packed(implementation: str) -> tuple[Tensor, ...]:
    """The same from this rank's share of the tokens."""
    size = parallel_state.get_context_parallel_world_size()
    config = transformer_config(context_parallel_size=size)
    attention: Any = (
        ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self")
        if implementation == "local"
        else isolating(UnequalSequences)(config)
    )
    zigzag = Zigzag.of(parallel_state.get_context_parallel_group())
    leaves = [zigzag.own(t.detach(), dim=0).requires_grad_() for t in inputs()]
    documents = PackedDocuments.from_position_ids(POSITIONS)
    output = attention(*leaves, None, AttnMaskType.causal, None, documents)
    return output.detach(), *torch.autograd.grad(output, leaves, zigzag.own(cotangent(), dim=0))


def packed_on_two_ranks(implementation: str) -> tuple[Tensor, ...]:
    with model_parallel(context=2):
        return packed(implementation)


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_packed_documents_are_documents_alone(one_process: None, implementation: str) -> None:
    for ours, expected in zip(packed(implementation), alone(), strict=True):
        assert relative_error(ours, expected) < 1e-6


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_on_two_context_parallel_ranks(implementation: str, tmp_path: Path) -> None:
    of_ranks = run_ranks(packed_on_two_ranks, 2, tmp_path, implementation)
    expected = alone()
    for rank, ours in enumerate(of_ranks):
        for tensor, whole in zip(ours, expected, strict=True):
            assert relative_error(tensor, Zigzag(2, rank).own(whole, dim=0)) < 1e-6
