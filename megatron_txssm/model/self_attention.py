"""Self-attention that shares its rotary spectrum with the state-space layers."""

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding


class UnifiedRotarySelfAttention(SelfAttention):
    """Megatron's SelfAttention with Unified RoPE on Q and K (arXiv:2506.09507, eq. 2, 3)."""

    def __init__(self, *args: Any, rotary: UnifiedRotaryEmbedding, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rotary = rotary
        self.zigzag = Zigzag.of(self.pg_collection.cp)

    def forward(self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        """[S, B, D] → ([S, B, D], bias). Only the length of `rotary_pos_emb` is used (None: no positions)."""
        if rotary_pos_emb is not None:
            length, width = rotary_pos_emb.shape[0], rotary_pos_emb.shape[-1]
            table = self.rotary.megatron_table(length * self.zigzag.size, width, device=hidden_states.device)
            rotary_pos_emb = self.zigzag.own(table, dim=0)
        return super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
