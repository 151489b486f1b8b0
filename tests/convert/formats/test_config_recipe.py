"""A recipe made of a config.json: that of the model, whatever its format, or the reason why there is none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_txssm.architecture.parameters import ExpertSizes
from megatron_txssm.cli.main import main
from megatron_txssm.convert import importer
from megatron_txssm.convert.formats.config import hf_config
from megatron_txssm.convert.formats.config_check import check_config
from megatron_txssm.convert.formats.config_recipe import recipe_of_config
from megatron_txssm.convert.huggingface.folder import open_hf_folder
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from tests.convert.formats.test_config import BY_HAND
from tests.convert.formats.test_mapping import load

VARIANTS = {model: (variant, changes) for model, (variant, changes, _) in BY_HAND.items()}


def made(folder: Path, format: str, config: dict[str, Any]) -> Recipe:
    (folder / "config.json").write_text(json.dumps(config))
    recipe = recipe_of_config(folder, config, format)
    check_config(folder, config, recipe, format, "none")
    return recipe


@pytest.mark.parametrize("model", VARIANTS)
def test_the_model_is_the_same(tmp_path: Path, model: str) -> None:
    recipe, format = load(*VARIANTS[model]), model.split()[0]
    found = made(tmp_path, format, hf_config(recipe, format))
    assert hf_config(found, format) == hf_config(recipe, format)
    assert found.layers == recipe.layers and found.data.vocab_size == recipe.data.vocab_size
    # Of an attention-only model nothing asks for it.
    if recipe.has_state_space:
        assert found.state_space == recipe.state_space
    assert found.experts == recipe.experts
    if recipe.has_experts:
        assert found.model.moe_aux_loss_coeff == 0.03
    # Nothing of the recipe whose training it has: neither its corpus nor the corpus's weights.
    assert (found.data.corpus, found.data.weights) == (f"data/{tmp_path.name}", None)
    assert load_recipe_text(tmp_path, found.to_yaml()) == found


def load_recipe_text(folder: Path, text: str) -> Recipe:
    (folder / "again.yaml").write_text(text)
    return load_recipe(folder / "again.yaml")


def stock_llama(folder: Path, **settings: Any) -> LlamaConfig:
    """As transformers saves one; sizes of no recipe, a base of its own."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    rest: dict[str, Any] = {
        "num_key_value_heads": 2,
        "vocab_size": 77,
        "rms_norm_eps": 2e-4,
        "max_position_embeddings": 300,
    }
    rope = {"rope_type": "default", "rope_theta": 600_000.0}
    config = LlamaConfig(**sizes, **rest, **{"rope_parameters": rope, **settings})
    LlamaForCausalLM(config).save_pretrained(folder)
    return config


def test_a_stock_llama_needs_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock_llama(tmp_path / "a llama")
    tasks = []
    monkeypatch.setattr(importer, "run_task", lambda task, **arguments: tasks.append(task))
    out = tmp_path / "imported"
    assert main(["convert", "import", str(tmp_path / "a llama"), str(out), "--no-verify"]) == 0
    assert tasks == ["save_megatron"]
    recipe, model = load_recipe(out / "recipe.yaml"), load_recipe(out / "recipe.yaml").model
    assert recipe.name == "a_llama" and recipe.layers == "*-*-*-" and recipe.training.seq_length == 256
    assert (model.rotary_base, model.norm_epsilon, model.num_query_groups) == (600_000, 2e-4, 2)
    assert not model.tie_embeddings and recipe.data.vocab_size == 77
    said = capsys.readouterr().out
    assert f"{out}/recipe.yaml: the model as config.json describes it" in said
    assert f"txssm pretrain {out}/recipe.yaml --set checkpoint.load_from={out}" in said


def stock_granite(folder: Path, **settings: Any) -> GraniteMoeHybridForCausalLM:
    """As transformers saves one with experts."""
    sizes: dict[str, Any] = {
        "vocab_size": 77,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "intermediate_size": 24,
        "shared_intermediate_size": 40,
        "router_aux_loss_coef": 0.07,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "attention_multiplier": 8**-0.5,
    }
    torch.manual_seed(0)
    model = GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**{**sizes, **settings}))
    model.save_pretrained(folder)
    return model


def test_a_stock_granite_with_experts_needs_no_recipe(tmp_path: Path) -> None:
    model = stock_granite(tmp_path)
    opened = open_hf_folder(tmp_path)
    assert opened.recipe.layers == "ME*E" and opened.recipe.model.moe_aux_loss_coeff == 0.07
    assert opened.recipe.experts == ExpertSizes(num_experts=5, topk=3, ffn_hidden_size=24, shared_ffn_hidden_size=40)
    tensors, ours = opened.read(opened.shapes), dict(model.named_parameters())
    for megatron, name in (
        ("router.weight", "block_sparse_moe.router.weight"),
        ("experts.experts.linear_fc1.weight", "block_sparse_moe.experts.gate_up_proj"),
        ("experts.experts.linear_fc2.weight", "block_sparse_moe.experts.down_proj"),
        ("shared_experts.linear_fc1.weight", "shared_mlp.input_linear.weight"),
    ):
        assert torch.equal(tensors[f"decoder.layers.3.mlp.{megatron}"], ours[f"model.layers.1.{name}"]), name


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # One expert has no use for a router.
        ({"num_experts_per_tok": 1}, "moe_router_topk=1"),
        ({"num_experts_per_tok": 6}, "moe_router_topk=6 is more than num_experts=5"),
        ({"residual_multiplier": 0.5}, "has residual_multiplier=0.5, where recipe"),
    ],
)
def test_other_granites_with_experts_are_refused(tmp_path: Path, settings: dict[str, Any], wanted: str) -> None:
    stock_granite(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(UserError, match=wanted):
        made(tmp_path, "granitemoehybrid", config | settings)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "has rope_type='llama3', which no recipe has; linear and default are",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, "rotary_base=0.5 is no whole number"),
        ({"hidden_act": "gelu"}, "has hidden_act='gelu', where recipe llama asks for 'silu'; no recipe can describe"),
        (
            {"mlp_bias": True},
            "has mlp_bias=True, where recipe llama asks for False; no recipe can describe such a model",
        ),
        ({"vocab_size": 0}, "describes a model that no recipe can: "),
    ],
)
def test_what_no_recipe_can_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], wanted: str
) -> None:
    folder = tmp_path / "llama"
    config = stock_llama(folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | settings, default=str))
    assert main(["convert", "import", str(folder), str(tmp_path / "out")]) == 2
    assert wanted in capsys.readouterr().err


def test_the_authors_models_stretch_rope_by_themselves(tmp_path: Path) -> None:
    config = hf_config(load(*VARIANTS["reference"]), "reference")
    with pytest.raises(UserError, match="has rope_type='dynamic', which no recipe has"):
        made(tmp_path, "reference", {name: value for name, value in config.items() if name != "rope_scaling"})
    torch.testing.assert_close(made(tmp_path, "reference", config).model.norm_epsilon, 3e-4)
