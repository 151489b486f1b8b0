"""Multi-token prediction (arXiv:2412.19437, section 2.2): Megatron's module, with the stack's layers in each depth.

Depth k reads the hidden states of depth k-1 and the embeddings of the tokens k places ahead, and predicts the token
after those. Embedding and LM head are the model's own.

B=batch  L=tokens on this rank
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.model.documents import PackedDocuments
from megatron_txssm.model.local_modules import backend_of

_roll_samples: Any = multi_token_prediction.roll_tensor


class PredictionLayer(MultiTokenPredictionLayer):
    """One depth. Its layers, like those of the stack, follow from the model's config."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layers_of: Callable[[TransformerConfig], HybridStackSubmodules],
        hybrid_submodules: object,
        **kwargs: Any,
    ):
        multi_token_prediction.roll_tensor = roll_tokens
        backend = backend_of(config)
        norm = backend.layer_norm(rms_norm=True)
        own = MultiTokenPredictionLayerSubmodules(
            enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=backend.column_parallel_linear()
        )
        super().__init__(config, own, hybrid_submodules=layers_of(config), **kwargs)


def roll_tokens(
    tensor_BL: Tensor,
    shifts: int = -1,
    dims: int = -1,
    cp_group: ProcessGroup | None = None,
    packed_seq_params: PackedDocuments | None = None,
) -> tuple[Tensor, Tensor]:
    """Each token's place takes the next token of its document, or 0; and the sum, a mean over context-parallel ranks.

    Megatron's function only divides samples into documents if they are flattened. Of a loss mask, it returns the number
    of tokens on this rank, by which the loss is then divided: as the ranks have different numbers, their losses would
    have different weights.
    """
    rolled_BL, _ = _roll_samples(tensor_BL, shifts, dims, cp_group)
    if packed_seq_params is not None:
        assert packed_seq_params.position_BL is not None
        # The token before the first of the next document; the last of the sample has no next token in any case.
        is_last_BL = packed_seq_params.position_BL.roll(-1, 1) == 0
        rolled_BL = rolled_BL.masked_fill(Zigzag.of(cp_group).own(is_last_BL), 0)
    total = rolled_BL.sum()
    if cp_group is not None and cp_group.size() > 1 and tensor_BL.is_floating_point():
        torch.distributed.all_reduce(total, group=cp_group)
        total = total / cp_group.size()
    return rolled_BL, total
