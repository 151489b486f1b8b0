"""muP: initial weights, learning rate and epsilon of each parameter, and activations as large at every width."""

import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_mup_config_overrides
from megatron.core.optimizer import get_standard_config_overrides as standard_overrides
from torch import Tensor

from megatron_txssm.architecture.layer_pattern import layers
from megatron_txssm.model.initialization import initialize_by_name
from megatron_txssm.recipe.changes import changed
from tests.support.recipes import TINY
from tests.support.tiny_model import VOCABULARY, assembled, build_hybrid, pieces, state_space_config, transformer_config

PATTERN = "M-*E"
BASE, STD, LEARNING_RATE, EPS = 16, 0.02, 0.01, 1e-8
# With and without muP.
MUP: dict[str, Any] = {"use_mup": True, "mup_base_hidden_size": BASE, "mup_attn_scale_power": 0.5}
PLAIN: dict[str, Any] = {}


def model_of(width: int, mup: dict[str, Any], *, pattern: str = PATTERN, tied: bool = True) -> Any:
    """A model with all kinds of layers, whose heads are as wide at every width."""
    config = transformer_config(
        num_layers=len(layers(pattern)),
        hidden_size=width,
        num_attention_heads=width // 4,
        num_query_groups=width // 8,
        kv_channels=4,
        ffn_hidden_size=2 * width,
        is_hybrid_model=True,
        init_method_std=STD,
        num_moe_experts=2 if "E" in pattern else None,
        moe_ffn_hidden_size=width if "E" in pattern else None,
        **mup,
    )
    sizes = {"hidden_size": width, "num_heads": width // 4, "head_dim": 4}
    state_space = state_space_config(position_encoding="conv1d_d", gated=True, **sizes)
    model = build_hybrid(pattern, config, state_space, share_embeddings_and_output_weights=tied)
    initialize_by_name(model, seed=1)
    return model


def optimizer_of(model: Any, **settings: Any) -> Any:
    """Megatron's, with the overrides that its training loop makes."""
    model.ddp_config = DistributedDataParallelConfig()
    config = OptimizerConfig(lr=LEARNING_RATE, min_lr=0.0, adam_eps=EPS, clip_grad=0.0, **settings)
    overrides = standard_overrides(config)
    if model.config.use_mup:
        overrides |= get_mup_config_overrides(config, model.config.mup_width_mult)
    return get_megatron_optimizer(config, [model], config_overrides=overrides)


def weights(model: Any) -> dict[str, Tensor]:
    return assembled([pieces(model, dict(model.named_parameters()))])


def test_initial_weights(one_process: None) -> None:
    """Matrices between hidden channels by 1/√(width/base); embedding, LM head and what has no width, not at all."""
    model = model_of(64, MUP, tied=False)
    plain = weights(model_of(64, PLAIN, tied=False))
    for name, tensor in weights(model).items():
        hidden = tensor.dim() > 1 and not any(part in name for part in ("embedding", "output_layer", "conv1d"))
        torch.testing.assert_close(tensor, plain[name] / 2 if hidden else plain[name], msg=name)


def test_learning_rates(one_process: None) -> None:
    model = model_of(64, MUP, tied=False)
    settings = {}
    for group in optimizer_of(model).param_groups:
        settings |= {id(param): (group["max_lr"], group["eps"]) for param in group["params"]}
    names = dict(model.named_parameters())
    assert len(settings) == len(names)
    matrices = 0
    for name, param in names.items():
        hidden = name.endswith(("proj.weight", "linear_qkv.weight", "_fc1.weight", "_fc2.weight", "router.weight"))
        matrices += hidden
        assert settings[id(param)] == ((LEARNING_RATE / 4, EPS / 4) if hidden else (LEARNING_RATE, EPS)), name
    # Two of mixer, attention and FFN each, and of two experts; the router.
    assert matrices == 2 * 3 + 2 * 2 + 1
    assert {"conv1d_weight", "A_log", "D"} <= {name.rpartition(".")[2] for name in names}


def test_the_base_is_a_model_without_mup(one_process: None) -> None:
    mup, plain = model_of(BASE, MUP), model_of(BASE, PLAIN)
    theirs = weights(plain)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(mup).items())
    tokens = torch.arange(8)[None]
    assert torch.equal(mup(tokens, tokens, None), plain(tokens, tokens, None))
    kinds = [{(group["lr"], group["eps"]) for group in optimizer_of(model).param_groups} for model in (mup, plain)]
    assert kinds[0] == kinds[1] == {(LEARNING_RATE, EPS)}


@pytest.mark.parametrize("mup", [MUP, PLAIN], ids=["mup", "plain"])
def test_activations_grow_with_the_width_only_without_mup(one_process: None, mup: dict[str, Any]) -> None:
    narrow, wide = (activations(model_of(width, mup, pattern="M-*-")) for width in (16, 256))
    growth = {kind: wide[kind] / narrow[kind] for kind in narrow}
    print({kind: round(rise, 2) for kind, rise in growth.items()})
    assert growth.keys() == {"in_proj", "out_proj", "self_attention", "mlp", "logits"}
    if mup:
        assert all(0.5 < rise < 2 for rise in growth.values()), growth
    else:
        assert growth["in_proj"] > 4 and growth["mlp"] > 4 and growth["logits"] > 2, growth


def activations(model: Any) -> dict[str, float]:
    """Mean absolute output of each kind of sub-layer after some steps."""
    found: dict[str, list[float]] = {}

    def keep(kind: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        found.setdefault(kind, []).append(float(tensor.detach().abs().mean()))

    optimizer = optimizer_of(model)
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randint(8, (8, 33), generator=generator).cumsum(1) + 5) % VOCABULARY
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    for _ in range(6):
        loss = model(inputs, inputs, None, labels=labels).mean()
        model.zero_grad()
        loss.backward()
        for param in model.parameters():
            param.main_grad = param.grad
        for group in optimizer.param_groups:
            group["lr"] = group["max_lr"]
        optimizer.step()
    for name, module in model.named_modules():
        if (kind := name.rpartition(".")[2]) in ("in_proj", "out_proj", "self_attention", "mlp"):
            module.register_forward_hook(lambda _, inputs, output, kind=kind: keep(kind, output))
    keep("logits", model(inputs, inputs, None))
    return {kind: statistics.mean(values) for kind, values in found.items()}


def test_the_tool_widens_in_proportion_and_fits_a_power() -> None:
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "check_mup.py"))
    assert tool["slope"]([64, 128, 256], [3.0, 6.0, 12.0]) == pytest.approx(1)
    recipe = tool["widened"](changed(TINY, {"model.state_num_heads": 4}), 128, 32, True, 0.5)
    model = recipe.model
    assert (model.ffn_hidden_size, model.num_attention_heads, model.state_num_heads) == (256, 8, 16)
    assert recipe.kv_channels == TINY.kv_channels and model.num_query_groups is None
    assert (model.mup_base_hidden_size, recipe.optimizer.learning_rate) == (32, 0.5)
