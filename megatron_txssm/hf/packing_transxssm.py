"""Packed documents: which token belongs to which document, for attention, state and convolution, from any marking.

B=batch  L=sequence length
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.import_utils import is_tracing

from megatron_txssm.hf.versions_transxssm import CACHE_NAME
from megatron_txssm.ops.ssd_reference import number_documents

# Arguments that collators pass for flash attention's variable-length kernel.
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def packed_documents(
    shape: tuple[int, int],
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
    position_ids: Tensor | None,
    mask_BL: Tensor | None,
) -> Tensor | None:
    """[B, L]: a row's documents numbered 0, 1, 2, …; padding (0 in `mask_BL`) belongs to the document before it.

    They begin at `cu_seq_lens` (over all rows concatenated), otherwise where `seq_idx` changes, otherwise where
    `position_ids` do not increase by one. None: one document per row.
    """
    if cu_seq_lens is not None:
        tokens = torch.arange(shape[0] * shape[1], dtype=cu_seq_lens.dtype, device=cu_seq_lens.device)
        key_BL = torch.searchsorted(cu_seq_lens[1:].contiguous(), tokens, right=True).view(shape)
    elif seq_idx is not None:
        if seq_idx.dim() != 2 or seq_idx.shape[1] != shape[1] or seq_idx.shape[0] not in (1, shape[0]):
            raise ValueError(f"seq_idx.shape={list(seq_idx.shape)} does not fit the tokens; use {list(shape)}")
        key_BL = seq_idx.expand(shape)
    # Detecting packed rows under a mask requires values, which a compiled graph cannot read.
    elif position_ids is not None and (mask_BL is None or not is_tracing(position_ids)):
        key_BL = (position_ids - _rank(position_ids, mask_BL)).expand(shape)
    else:
        return None
    if mask_BL is not None:
        key_BL = key_BL.gather(1, _last_real(mask_BL))
    documents_BL = number_documents(key_BL)
    return documents_BL if is_tracing(documents_BL) or documents_BL[:, -1].any() else None


def positions_in_documents(documents_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
    """[B, L]: the number of tokens before each one in its document, not counting padding."""
    rank_BL = _rank(documents_BL, mask_BL).expand_as(documents_BL)
    starts_BL = F.pad(documents_BL[:, 1:] != documents_BL[:, :-1], (1, 0))
    return rank_BL - (rank_BL * starts_BL).cummax(1).values


def attention_inputs(
    config: PreTrainedConfig,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    cache: Any,
    documents_BL: Tensor | None,
    lengths: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The mask for the configured attention implementation, and arguments for a kernel without a mask.

    `lengths` are the caller's values of LENGTHS.
    """
    common: dict[str, Any] = {"config": config, "inputs_embeds": hidden_states, CACHE_NAME: cache}
    if documents_BL is None:
        return create_causal_mask(attention_mask=attention_mask, **common), {}
    if attention_mask is not None:
        same_document = packed_sequence_mask_function(documents_BL)
        mask: Any = create_causal_mask(attention_mask=attention_mask, and_mask_function=same_document, **common)
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} takes padding or packed documents, not both; "
                "leave attention_mask out, and mark padding as a separate document"
            )
        return mask, {}
    common[CACHE_NAME] = None  # Empty: transformers detects packed documents only without a cache.
    positions_BL = positions_in_documents(documents_BL, None)
    mask = create_causal_mask(attention_mask=None, position_ids=positions_BL, **common)
    kernel: dict[str, Any] = {"position_ids": positions_BL}
    if mask is None:
        if any(lengths.get(name) is None for name in LENGTHS):
            (cu_q, cu_k), (longest_q, longest_k) = prepare_fa_kwargs_from_position_ids(positions_BL)
            lengths = dict(zip(LENGTHS, (cu_q, cu_k, longest_q, longest_k), strict=True))
        kernel |= lengths
    return mask, kernel


def _rank(like: Tensor, mask_BL: Tensor | None) -> Tensor:
    """[B or 1, L]: the number of tokens before each one in its row, not counting padding."""
    if mask_BL is None:
        return torch.arange(like.shape[1], device=like.device)[None]
    return (mask_BL.long().cumsum(1) - 1).clamp(min=0)


def _last_real(mask_BL: Tensor) -> Tensor:
    """[B, L]: the index of the last non-padding token up to this one; before the first, that of the first."""
    mask_BL = mask_BL.bool()
    places_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    return torch.where(mask_BL, places_L, mask_BL.int().argmax(1, keepdim=True)).cummax(1).values
