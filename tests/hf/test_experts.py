"""Experts: every implementation that transformers has, the router's precision, its logits and their load balance."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_txssm.hf.ffn_transxssm import TransXSSMExperts, TransXSSMRouter
from tests.hf.tiny import padded_left, random_ids, tiny_config, tiny_model

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def modules(model: Any, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_all_implementations_of_the_experts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and every gradient; and each is what computes them. One expert is chosen by no token."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # Wide enough for the order of sums to differ.
    model, ids = tiny_model("experts", moe_intermediate_size=200), random_ids(2, 30)
    for router in modules(model, TransXSSMRouter):
        # Each token chooses 2 or 4, and the better of 0 and 1.
        router.weight.data[2] *= 1e4
        router.weight.data[4] = -router.weight.data[2]
        router.weight.data[3] = router.weight.data[:2].mean(0)
    assert model.config._experts_implementation == "grouped_mm"
    used: list[str] = []
    for name in IMPLEMENTATIONS[1:]:
        function = ALL_EXPERTS_FUNCTIONS[name]

        def spy(*arguments: Any, name: str = name, function: Any = function) -> Tensor:
            used.append(name)
            return function(*arguments)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, spy)
    results = []
    for name in IMPLEMENTATIONS:
        used.clear()
        model.set_experts_implementation(name)
        results.append((model(ids).logits, gradients(model, ids)))
        assert set(used) == {name} - {"eager"}
    assert not results[0][1]["model.layers.0.mlp.experts.down_proj"][3].any()
    for logits, gradient in results[1:]:
        torch.testing.assert_close(logits, results[0][0], rtol=1e-5, atol=1e-5)
        for name, tensor in gradient.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_implementation_is_chosen_at_loading(tmp_path: Any) -> None:
    tiny_model("experts").save_pretrained(tmp_path)
    for name in IMPLEMENTATIONS:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
        assert loaded.get_experts_implementation() == {"": name}


@pytest.mark.parametrize("way", ["bf16 weights", "autocast"])
@torch.no_grad()
def test_the_router_computes_in_fp32(way: str) -> None:
    """From inputs and weights rounded to bf16; as in Megatron, whose router weights are bf16 in a bf16 model."""
    model = tiny_model("experts")
    router = modules(model.bfloat16() if way == "bf16 weights" else model, TransXSSMRouter)[0]
    hidden_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        logits_TN, weights_TK, experts_TK = router(hidden_TD)
    expected_TN = hidden_TD.double() @ router.weight.double().T
    torch.testing.assert_close(logits_TN.double(), expected_TN, rtol=1e-5, atol=1e-6)
    chosen_TK, expected_TK = expected_TN.topk(2)
    assert logits_TN.dtype == weights_TK.dtype == torch.float32 and torch.equal(experts_TK, expected_TK)
    torch.testing.assert_close(weights_TK.double(), chosen_TK.softmax(-1), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_half_precision_sums_experts_in_fp32() -> None:
    """As transformers' implementations do: seven experts' outputs, of which the first is large."""
    config = tiny_config("experts", num_experts=7, num_experts_per_tok=7, moe_intermediate_size=1)
    experts: Any = TransXSSMExperts(config)
    config._experts_implementation = "eager"
    experts.gate_up_proj.fill_(1 / 32)
    experts.down_proj.fill_(1)
    experts.down_proj[0] = 256
    hidden_TD = torch.ones(1, 32).bfloat16()
    out_TD = experts.bfloat16()(hidden_TD, torch.arange(7)[None], torch.ones(1, 7))
    # silu(1) · 1 · (256 + 6); with rounding after each expert, the six would be lost.
    one = torch.nn.functional.silu(torch.ones(())).bfloat16().float()
    torch.testing.assert_close(out_TD, (one * 262).expand(1, 32).bfloat16(), rtol=0, atol=0)


def load_balance(logits: list[Tensor], mask_BL: Tensor, chosen: int) -> Tensor:
    """num_experts · Σ_n (chosen assignments per token to expert n) · (its mean probability), over all sparse layers."""
    rows_TN = torch.cat([layer_TN[mask_BL.flatten().bool()] for layer_TN in logits]).double()
    experts = rows_TN.shape[1]
    assigned = torch.zeros_like(rows_TN).scatter(1, rows_TN.topk(chosen).indices, 1.0)
    return experts * (assigned.mean(0) * rows_TN.softmax(-1).mean(0)).sum()


def test_the_routers_logits_and_their_load_balance_are_given_on_request() -> None:
    model, (ids, mask) = tiny_model("experts", router_aux_loss_coef=0.5), padded_left()
    plain = model(ids, attention_mask=mask, labels=ids)
    assert plain.router_logits is None and plain.aux_loss is None
    asked = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert [tuple(logits_TN.shape) for logits_TN in asked.router_logits] == [(4 * 40, 5)] * 2, "two sparse layers"
    expected = load_balance(list(asked.router_logits), mask, chosen=2)
    torch.testing.assert_close(asked.aux_loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(asked.loss, plain.loss + 0.5 * asked.aux_loss)
    # A mask counts whatever is not zero.
    numbers = mask * torch.arange(1, 41)
    numbered = model(ids, attention_mask=numbers, labels=ids, output_router_logits=True)
    torch.testing.assert_close(numbered.aux_loss, asked.aux_loss)
    configured = tiny_model("experts", router_aux_loss_coef=0.5, output_router_logits=True)
    torch.testing.assert_close(configured(ids, attention_mask=mask, labels=ids).loss, asked.loss)
    asked.aux_loss.backward()
    assert all(router.weight.grad.any() for router in modules(model, TransXSSMRouter))


def test_a_model_without_experts_has_no_load_balance() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    output = model(ids, labels=ids, output_router_logits=True)
    assert output.aux_loss is None and torch.equal(output.loss, model(ids, labels=ids).loss)
