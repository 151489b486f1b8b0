"""Without apex, the LM head's fused gradient accumulation equals the unfused one."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_txssm.platform.gradient_accumulation import stand_in_for_apex


def linear(fused: bool) -> Any:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, gradient_accumulation_fusion=fused)
    made: Any = layers.ColumnParallelLinear(
        8, 12, config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=False, gather_output=False
    )
    made.weight.main_grad = torch.ones(12, 8)
    made.weight.grad_added_to_main_grad = False
    return made


@pytest.fixture
def without_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """No apex, as in the test environment; undoes the stand-in afterwards."""
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)


def test_megatron_refuses_the_layer_without_a_stand_in(one_process: None, without_apex: None) -> None:
    with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda module is not found"):
        linear(fused=True)


def test_two_micro_batches_add_to_the_buffer(one_process: None, without_apex: None) -> None:
    stand_in_for_apex()
    fused, plain = linear(fused=True), linear(fused=False)
    plain.weight.data.copy_(fused.weight.data)
    for seed in (0, 1):
        x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(seed))
        for layer in (fused, plain):
            layer(x)[0].square().sum().backward()
    assert fused.weight.grad_added_to_main_grad
    torch.testing.assert_close(fused.weight.main_grad, 1 + plain.weight.grad)
