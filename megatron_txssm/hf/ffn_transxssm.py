"""What follows the mixer in each block: an FFN, or experts of which a router chooses some for each token.

B=batch  L=sequence length  D=hidden size  T=tokens (B·L)  N=experts  K=experts per token  F=channels of an expert
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from megatron_txssm.hf.configuration_transxssm import TransXSSMConfig


def residual_projection(width: int, config: TransXSSMConfig) -> nn.Linear:
    """A projection into the residual stream, marked for `_init_weights`, which transformers calls module by module."""
    projection = nn.Linear(width, config.hidden_size, bias=False)
    setattr(projection, "into_residual_stream", True)
    return projection


class TransXSSMMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransXSSMConfig, channels: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.down_proj = residual_projection(channels, config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class TransXSSMRouter(nn.Module):
    """Chooses K experts for each token, and weights them by the softmax over the chosen ones' logits; all in fp32."""

    def __init__(self, config: TransXSSMConfig):
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """→ logits [T, N], weights [T, K], the chosen experts [T, K]."""
        # Otherwise autocast would compute in half precision.
        with torch.autocast(hidden_TD.device.type, enabled=False):
            logits_TN = F.linear(hidden_TD.float(), self.weight.float())
            chosen_TK, experts_TK = logits_TN.topk(self.experts_per_token, dim=-1)
            return logits_TN, chosen_TK.softmax(-1), experts_TK


@use_experts_implementation
class TransXSSMExperts(nn.Module):
    """SwiGLU FFNs in two tensors, as transformers' `experts_implementation` asks for; `forward` is its "eager"."""

    def __init__(self, config: TransXSSMConfig):
        super().__init__()
        channels = config.moe_intermediate_size or 0
        self.num_experts = config.num_experts
        # Rows of the gates, then those of the up-projections.
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * channels, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, channels))
        # Read by transformers' implementations.
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D], chosen experts [T, K], their weights [T, K] → [T, D]."""
        out_TD = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for expert in range(self.num_experts):
            tokens, places = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            output = F.linear(F.silu(gate) * up, self.down_proj[expert])
            out_TD = out_TD.index_add(0, tokens, output * top_k_weights[tokens, places, None])
        return out_TD.to(hidden_states.dtype)


class TransXSSMSparseMLP(nn.Module):
    """The chosen experts' outputs, weighted by the router, plus the output of an expert for all tokens, if any."""

    def __init__(self, config: TransXSSMConfig):
        super().__init__()
        self.gate = TransXSSMRouter(config)
        self.experts = TransXSSMExperts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = TransXSSMMLP(config, shared) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_TD = hidden_states.flatten(0, 1)
        _, weights_TK, experts_TK = self.gate(hidden_TD)
        out: Any = self.experts(hidden_TD, experts_TK, weights_TK).view_as(hidden_states)
        return out if self.shared_expert is None else out + self.shared_expert(hidden_states)


def ffn_of_block(config: TransXSSMConfig, layer_idx: int) -> nn.Module:
    """[B, L, D] → [B, L, D]."""
    if config.is_sparse(layer_idx):
        return TransXSSMSparseMLP(config)
    return TransXSSMMLP(config, config.intermediate_size)
