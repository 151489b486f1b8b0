"""Attention kernels that a CPU lacks: flash attention from its definition, and flex attention without a compiler.

transformers' code around them runs as on a GPU.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import modeling_flash_attention_utils as flash
from transformers.integrations import flex_attention as flex

from megatron_txssm.hf import TransXSSMForCausalLM

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def use_attention(model: TransXSSMForCausalLM, implementation: str, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Sets the implementation; returns a list that records the document borders passed to flash attention."""
    borders: list[list[int]] = []

    def one_text(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, **_: Any) -> Tensor:
        """[B, L, H, P]."""
        assert causal
        query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
        behind = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        out = F.scaled_dot_product_attention(query, key, value, behind, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: Any,
        max_seqlen_k: Any,
        softmax_scale: float = 1.0,
        causal: bool = False,
    ) -> Tensor:
        """Concatenated documents, [tokens, H, P]."""
        lengths = cu_seqlens_q.diff().tolist()
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        borders.append(cu_seqlens_q.tolist())
        parts = zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
        documents = [one_text(*(x[None] for x in part), softmax_scale=softmax_scale, causal=causal) for part in parts]
        return torch.cat(documents, dim=1)[0]

    process = flash._lazy_define_process_function(varlen)
    functions = (one_text, varlen, None, flash._pad_input, flash._unpad_input), (process, process)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: functions)
    monkeypatch.setattr(
        flex, "compile_friendly_flex_attention", lambda *tensors, training, **rest: flex_attention(*tensors, **rest)
    )
    # set_attn_implementation would look for the kernel.
    model.config._attn_implementation = implementation
    return borders
