"""One step of Muon on a model of every kind of layer: matrices, and each component of a packed one, by themselves."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_txssm.architecture.layer_pattern import layers
from tests.support.tiny_model import build_hybrid, perturb, relative_error, state_space_config, transformer_config

PATTERN = "M-*E"
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, FACTOR = 0.01, 0.9, 0.1, 0.2
# Keller Jordan's five steps (modded-nanogpt), which NVIDIA's package calls quintic.
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Of the tiny model: heads of 4 channels, two of queries to each of keys; rows of z, x, B, C and dt.
QKV = [8, 4, 4]
STATE_SPACE = {"rope": [24, 16, 16, 4], "conv1d_d": [24, 24, 16, 16, 4]}


def orthogonalized(matrix: Tensor) -> Tensor:
    """Newton-Schulz on the singular values, where each step is a polynomial, and the scale √max(rows, columns)."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    S = S / S.norm()
    for a, b, c in QUINTIC:
        S = a * S + b * S**3 + c * S**5
    return max(matrix.shape) ** 0.5 * (U * S) @ Vh


def components(name: str, matrix: Tensor, variant: str) -> Iterator[Tensor]:
    """Views of the matrices that make up a weight; the rest of its rows is padding."""
    if name.endswith("in_proj.weight"):
        yield from matrix[: sum(STATE_SPACE[variant])].split(STATE_SPACE[variant])
    elif name.endswith("linear_qkv.weight"):
        yield from (part.flatten(0, 1) for part in matrix.unflatten(0, (-1, sum(QKV))).split(QKV, dim=1))
    else:
        yield matrix


def a_step(variant: str) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, weight before, gradient, weight after) of every parameter."""
    config: TransformerConfig = transformer_config(
        num_layers=len(layers(PATTERN)), is_hybrid_model=True, num_moe_experts=2, moe_ffn_hidden_size=12
    )
    model = build_hybrid(PATTERN, config, state_space_config(position_encoding=variant, gated=variant == "conv1d_d"))
    perturb(model)
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="muon",
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            clip_grad=0.0,
            muon_momentum=MOMENTUM,
            muon_nesterov=True,
            muon_extra_scale_factor=FACTOR,
            muon_fp32_matmul_prec="high",
            muon_tp_mode="duplicated",
        ),
        [model],  # pyright: ignore[reportArgumentType]
    )
    for group in optimizer.param_groups:
        # As Megatron's schedule does.
        group["weight_decay"] = WEIGHT_DECAY * group["wd_mult"]
    generator = torch.Generator().manual_seed(1)
    before, gradients = {}, {}
    for name, parameter in model.named_parameters():
        before[name] = parameter.detach().clone()
        gradients[name] = torch.randn(parameter.shape, generator=generator)
        setattr(parameter, "main_grad", gradients[name].clone())
    optimizer.step()
    for name, parameter in model.named_parameters():
        yield name, before[name], gradients[name], parameter.detach()


@pytest.mark.parametrize("variant", ["rope", "conv1d_d"])
def test_one_step(one_process: None, variant: str) -> None:
    orthogonal = 0
    for name, before, gradient, after in a_step(variant):
        if gradient.dim() != 2 or "embedding" in name:
            # Adam's first step moves every number by the learning rate, in the direction of the gradient's sign.
            decay = 0.0 if gradient.dim() == 1 else WEIGHT_DECAY
            expected = before * (1 - LEARNING_RATE * decay) - LEARNING_RATE * gradient.sign()
            assert relative_error(after, expected) < 1e-5, name
            continue
        # Of momentum (1 - m)·g after one step, one step ahead: g + m·(momentum - g).
        ahead = gradient + MOMENTUM * ((1 - MOMENTUM) * gradient - gradient)
        update = (before * (1 - LEARNING_RATE * WEIGHT_DECAY) - after) / (LEARNING_RATE * FACTOR)
        parts = zip(components(name, ahead, variant), components(name, update, variant), strict=True)
        for number, (moved, by) in enumerate(parts):
            assert relative_error(by, orthogonalized(moved)) < 1e-3, (name, number)
            orthogonal += 1
    # In-projection, Q, K, V; two out-projections; two of the FFN and of each of two experts; a router.
    assert orthogonal == len(STATE_SPACE[variant]) + 3 + 2 + 2 * 3 + 1
