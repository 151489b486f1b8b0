"""Tiny TransXSSM models shared by this folder's tests: one of each kind that the paper compares, and one more."""

from typing import Any

import torch
from torch import Tensor

from megatron_txssm.hf import TransXSSMConfig, TransXSSMForCausalLM

VOCABULARY = 101
PADDING = 0
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
VARIANTS: dict[str, dict[str, Any]] = {
    "transxssm": {},
    "mamba2": {"layer_types": ["linear_attention"] * 3, "position_encoding": "conv1d_d", "state_gated": True},
    "jamba": {"position_encoding": "conv1d_d", "state_gated": True, "attention_position_encoding": "none"},
    # Length scaling starts within the tests' texts.
    "a_t": {"position_encoding": "a_t", "state_dt_bias": False, "length_scaling_base": 16},
    # Experts in some blocks.
    "experts": {
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
}


def tiny_config(variant: str = "transxssm", **overrides: Any) -> TransXSSMConfig:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "layer_types": HYBRID,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "state_size": 16,
        "state_head_dim": 8,
        "state_num_groups": 2,
        # Shorter than the texts, and not a divisor of their lengths.
        "chunk_size": 16,
        "pad_token_id": PADDING,
    }
    return TransXSSMConfig(**{**settings, **VARIANTS[variant], **overrides})


def tiny_model(variant: str = "transxssm", **overrides: Any) -> TransXSSMForCausalLM:
    """In evaluation mode, every parameter perturbed: ones and equal values would hide mistakes."""
    torch.manual_seed(0)
    model = TransXSSMForCausalLM(tiny_config(variant, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_left(length: int = 40, padding: tuple[int, ...] = (0, 3, 11, 20)) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of rows that begin with these numbers of padding tokens."""
    ids = random_ids(len(padding), length)
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    return ids.where(mask.bool(), PADDING), mask


def generate(model: Any, ids: Tensor | None, mask: Tensor | None = None, **options: Any) -> Any:
    """model.generate, greedy by default."""
    if mask is None and ids is not None:
        mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, **{"do_sample": False, **options})


def worst_difference(actual: Tensor, expected: Tensor) -> float:
    """max|a - b|."""
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    assert torch.isfinite(actual).all()
    return (actual.double() - expected.double()).abs().max().item()
