"""Padding masks and positions of new tokens, and the inputs that a cache cannot continue.

B=batch  L=sequence length
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_tracing

from megatron_txssm.hf.cache_transxssm import TransXSSMCache
from megatron_txssm.hf.configuration_transxssm import TransXSSMConfig


def check_continues(cache: TransXSSMCache, seq_idx: Tensor | None, cu_seq_lens: Tensor | None) -> None:
    """ValueError if the document of tokens after a cache is ambiguous."""
    if cache.packed:
        raise ValueError(
            "the cache holds packed documents, and it is unknown which of them continues; use one document per row"
        )
    if seq_idx is not None or cu_seq_lens is not None:
        raise ValueError(
            f"seq_idx and cu_seq_lens_q are only valid at the start of a text, but the cache holds {cache.seen_tokens} "
            "tokens of one; leave out either them or the cache"
        )


def check_static(config: TransXSSMConfig, documents_BL: Tensor | None) -> None:
    """ValueError for inputs and kernels whose masks do not cover a static cache's empty places."""
    if documents_BL is not None:
        raise ValueError("a static cache does not support packed documents; use one document per row, or another cache")
    if config.has_attention and is_flash_attention_requested(config):
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} would attend to the empty places of a static cache; "
            "use 'sdpa', or a cache without max_cache_len"
        )


def padding_masks(
    attention_mask: Tensor | None, cache: TransXSSMCache | None, new: Any, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """The mask over all tokens so far (with a static cache, over its capacity), and the mask of the new tokens."""
    if attention_mask is None:
        return None, None
    room = None if cache is None else cache.max_cache_len
    if attention_mask.dim() != 2 or attention_mask.shape[1] != room:
        if room is not None and is_tracing(attention_mask):
            raise ValueError(
                f"attention_mask.shape={list(attention_mask.shape)} would have a graph compiled for each token; use "
                f"[batch, max_cache_len] = [batch, {room}]"
            )
        seen = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask.dim() != 2 or attention_mask.shape[1] != seen + length:
            raise ValueError(
                f"attention_mask.shape={list(attention_mask.shape)} does not fit {seen} tokens in the cache and "
                f"{length} new ones; use [batch, {seen + length}], 0 on padding"
            )
        if cache is not None and room is not None:
            attention_mask = cache.whole_mask(attention_mask)
    return attention_mask, attention_mask[:, new].bool()


def token_positions(attention_mask: Tensor | None, new: Any, device: torch.device) -> Tensor:
    """[B or 1, L]: the number of tokens before each one, not counting padding."""
    if attention_mask is None:
        return (torch.arange(new.start or 0, new.stop, device=device) if isinstance(new, slice) else new)[None]
    return (attention_mask.bool().long().cumsum(-1) - 1).clamp(min=0)[:, new]
