"""The whole model against its equations, token by token: logits, and gradients of every parameter."""

from typing import Any

import pytest
import torch

from tests.hf.by_hand import logits_by_hand
from tests.hf.tiny import VARIANTS, random_ids, tiny_model

# Relative to the largest entry of a tensor; the model computes in fp32, the equations in fp64.
LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 3e-5, 1e-4
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in VARIANTS} | {
    "untied": ("transxssm", {"tie_word_embeddings": False}),
    "interpolated": (
        "transxssm",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "five taps": ("mamba2", {"conv_kernel": 5}),
    "no shared expert": (
        "experts",
        {"mlp_layer_types": None, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 0},
    ),
    "experts of the FFN's size": ("experts", {"num_experts_per_tok": 4, "moe_intermediate_size": None}),
    "attention alone": ("transxssm", {"layer_types": ["full_attention"] * 3}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_and_every_gradient_are_those_of_the_equations(setting: str) -> None:
    variant, overrides = SETTINGS[setting]
    model = tiny_model(variant, **overrides)
    ids = random_ids(2, 41)
    logits = model(ids).logits
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * cotangent).sum().backward()

    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters()}
    expected = logits_by_hand(model.config, exact, ids)
    (expected * cotangent.double()).sum().backward()

    assert (logits - expected).abs().max() / expected.abs().max() < LOGITS_TOLERANCE
    for name, parameter in model.named_parameters():
        gradient, wanted = parameter.grad, exact[name].grad
        assert gradient is not None and wanted is not None and wanted.any(), name
        error = ((gradient - wanted).abs().max() / wanted.abs().max()).item()
        assert error < GRADIENT_TOLERANCE, f"{name}: relative error {error:.1e}"
