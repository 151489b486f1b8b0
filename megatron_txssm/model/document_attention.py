"""Transformer Engine's core attention for packed documents, using its kernels for variable-length sequences ("thd").

S=length on this rank  T=length of the whole sample  B=batch  H=heads  D=head dim
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_context_parallel_group
from torch import Tensor

from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.model.documents import PackedDocuments, Segment

# A segment's last query sees its last key. Megatron's enum lacks this member, but only its name is read.
_BOTTOM_RIGHT = SimpleNamespace(name="padding_causal_bottom_right")


@functools.cache
def isolating(core_attention: Any) -> Any:
    """A subclass of `core_attention` (Megatron's TEDotProductAttention) that also accepts PackedDocuments.

    Under context parallelism it then gathers keys and values from all ranks: Transformer Engine's own ring requires
    every document to be padded and divided among the ranks.
    """

    class IsolatingAttention(core_attention):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: Any,
            attention_bias: Tensor | None = None,
            packed_seq_params: PackedSeqParams | None = None,
            **kwargs: Any,
        ) -> Tensor:
            """[S, B, H, D], twice [S, B, H_kv, D] → [S, B, H·D]."""
            if not isinstance(packed_seq_params, PackedDocuments):
                return super().forward(
                    query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params, **kwargs
                )
            parallel = self.config.context_parallel_size > 1
            zigzag = Zigzag.of(get_context_parallel_group() if parallel else None)
            if zigzag.size > 1:
                key, value = zigzag.gather_tokens(torch.stack([key, value], dim=2)).unbind(2)
            length, batch = query.shape[:2]
            segments = packed_seq_params.segments(zigzag)
            query, key, value = (t.transpose(0, 1).flatten(0, 1) for t in (query, key, value))
            if zigzag.size > 1:
                # Every piece of a document reads the document's keys.
                seen = _seen_keys(segments, length * zigzag.size, key.device)
                key, value = key[seen], value[seen]
            out = super().forward(
                query, key, value, None, _BOTTOM_RIGHT, None, _unequal_sequences(segments, query.device), **kwargs
            )
            return out.reshape(batch, length, -1).transpose(0, 1)

    return IsolatingAttention


def _seen_keys(segments: list[Segment], length: int, device: torch.device) -> Tensor:
    """Indices of all segments' keys, concatenated, into the batch's concatenated rows."""
    ranges = [(row * length + keys.start, row * length + keys.stop) for row, _, keys in segments]
    return torch.cat([torch.arange(*ends, device=device) for ends in ranges])


def _unequal_sequences(segments: list[Segment], device: torch.device) -> PackedSeqParams:
    """Transformer Engine's parameters for these segments, without its own context parallelism."""
    queries = [segment.queries.stop - segment.queries.start for segment in segments]
    keys = [segment.keys.stop - segment.keys.start for segment in segments]
    starts_q, starts_kv = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (queries, keys))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts_q.to(device, torch.int32),
        cu_seqlens_kv=starts_kv.to(device, torch.int32),
        max_seqlen_q=max(queries),
        max_seqlen_kv=max(keys),
        local_cp_size=1,
    )
