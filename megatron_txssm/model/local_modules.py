"""Norm and core attention for `transformer_impl: local`, where Megatron's own would fail or materialise scores.

S=sequence length of queries  T=sequence length of keys  B=batch  H=heads  D=hidden size or head dim
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider, get_backend
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.model.documents import PackedDocuments


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467) over the last dimension.

    Megatron's WrappedTorchNorm does not support sequence parallelism, under which each rank sees a part of the tokens.
    Here the weight is marked, so that Megatron sums its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D], in x's dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SeparateRMSNorm(RMSNorm):
    """A norm of its own with Transformer Engine, too: that after the last layer, and those before experts.

    It saves an empty extra state, as Megatron's local linear layers do: Transformer Engine's modules save one (FP8
    statistics) and reject a checkpoint without one. Its other norms are part of a linear layer.
    """

    def get_extra_state(self) -> None: ...

    def set_extra_state(self, state: Any) -> None: ...


class ScaledDotProductAttention(nn.Module):
    """Causal core attention with torch's fused kernels; Megatron's local attention materialises all scores.

    Under context parallelism keys and values are gathered from all ranks. Packed documents are computed one by one.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **kwargs: Any
    ):
        super().__init__()
        self.dropout = config.attention_dropout
        self.softmax_scale = kwargs.get("softmax_scale")
        pg_collection = kwargs.get("pg_collection")
        cp_group = get_context_parallel_group(check_initialized=False) if pg_collection is None else pg_collection.cp
        self.zigzag = Zigzag.of(cp_group if config.context_parallel_size > 1 else None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
    ) -> Tensor:
        """[S, B, H, D], [T, B, H_kv, D], [T, B, H_kv, D] → [S, B, H·D]."""
        if self.zigzag.size > 1:
            key, value = self.zigzag.gather_tokens(torch.stack([key, value], dim=2)).unbind(2)
        if packed_seq_params is not None:
            rows: list[list[Tensor]] = [[] for _ in range(query.shape[1])]
            for row, queries, keys in packed_seq_params.segments(self.zigzag):
                own = slice(row, row + 1)
                rows[row].append(self._attend(query[queries, own], key[keys, own], value[keys, own]))
            out = torch.cat([torch.cat(segments) for segments in rows], dim=1)
        elif self.zigzag.size > 1:
            ranges = self.zigzag.ranges(query.shape[0])
            pieces = zip(query.chunk(len(ranges)), ranges, strict=True)
            out = torch.cat([self._attend(piece, key[: r.stop], value[: r.stop]) for piece, r in pieces])
        else:
            out = self._attend(query, key, value)
        return out.flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[S, B, H, D]; queries are the last S of T positions: all of them, or the new tokens in decoding."""
        num_queries, num_keys = query.shape[0], key.shape[0]
        mask = None
        if 1 < num_queries < num_keys:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask = ones.tril(num_keys - num_queries)
        out = F.scaled_dot_product_attention(
            *(t.permute(1, 2, 0, 3) for t in (query, key, value)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=num_queries == num_keys,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.permute(2, 0, 1, 3)


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's local modules, with its norm and core attention replaced by those above."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        return RMSNorm if has_residual else SeparateRMSNorm

    def core_attention(self) -> type:
        return ScaledDotProductAttention


def backend_of(config: TransformerConfig) -> BackendSpecProvider:
    """The modules of `transformer_impl`: those above, or Transformer Engine's."""
    return TorchSpecProvider() if config.transformer_impl == "local" else get_backend(config.transformer_impl)
