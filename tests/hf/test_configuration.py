"""TransXSSMConfig: derived values, rejected values, and the round trip through a file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from megatron_txssm.hf import TransXSSMConfig, TransXSSMForCausalLM
from tests.hf.tiny import VARIANTS, random_ids, tiny_config, tiny_model, worst_difference


def test_the_defaults_are_the_paper_s_320m() -> None:
    config = TransXSSMConfig()
    assert config.layer_types == (["linear_attention"] * 7 + ["full_attention"]) * 3
    assert (config.num_key_value_heads, config.head_dim, config.state_num_heads) == (12, 64, 12)
    assert config.in_proj_sizes == {"x": 768, "B": 512, "C": 512, "dt": 12}
    assert list(tiny_config("mamba2").in_proj_sizes) == ["z", "x", "B", "C", "dt"]


def test_experts_are_everywhere_unless_the_layers_are_named() -> None:
    config = tiny_config(num_experts=4)
    assert config.mlp_layer_types == ["sparse"] * 3 and config.moe_intermediate_size == 48
    assert tiny_config().mlp_layer_types == ["dense"] * 3 and not tiny_config().has_experts


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_brings_the_configuration_back(variant: str, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    config = tiny_config(variant, rope_parameters=rope, tie_word_embeddings=False, eos_token_id=[3, 4])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is TransXSSMConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.rope_parameters == rope
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "transxssm" and len(written["layer_types"]) == 3


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn", "longrope", "llama3"])
def test_rotations_that_a_state_cannot_follow_are_refused(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(
        StrictDataclassError, match=rf"rope_type='{rope_type}' changes or scales .* use one of default, linear"
    ):
        tiny_config(rope_parameters=rope)


def test_a_rotation_changed_later_is_obeyed_or_refused() -> None:
    """Before and after the model is created, as a whole and in place."""
    ids, slow = random_ids(1, 30), {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    expected = tiny_model(rope_parameters=slow)(ids).logits
    model = tiny_model()
    assert worst_difference(model(ids).logits, expected) > 1e-2
    model.config.rope_parameters = slow
    assert torch.equal(model(ids).logits, expected)
    config = tiny_config()
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type='yarn' changes or scales"):
        TransXSSMForCausalLM(config)
    model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ValueError, match="rope_type='dynamic' changes or scales"):
        model(ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_encoding": "alibi"}, r"position_encoding='alibi' is unknown; use one of rope, conv1d_d, a_t"),
        (
            {"attention_position_encoding": "a_t"},
            r"attention_position_encoding='a_t' is unknown; use one of rope, none",
        ),
        ({"rotary_table_precision": "bf16"}, r"rotary_table_precision='bf16' is unknown; use one of fp32, fp64"),
        ({"layer_types": ["sliding_attention"] * 3}, r"sliding_attention"),
        ({"layer_types": ["full_attention"] * 2}, r"num_hidden_layers"),
        ({"mlp_layer_types": ["dense", "mlp", "sparse"]}, r"mlp_layer_types holds \['mlp'\]; use dense and sparse"),
        (
            {"mlp_layer_types": ["dense"] * 2},
            r"mlp_layer_types has 2 entries, not num_hidden_layers=3; use one for each layer",
        ),
        ({"mlp_layer_types": ["sparse"] * 3}, r"num_experts_per_tok=2 does not fit num_experts=0; use at least 1"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, r"num_experts_per_tok=5 does not fit num_experts=4"),
        ({"num_experts": 4, "num_experts_per_tok": 0}, r"num_experts_per_tok=0 does not fit num_experts=4"),
        ({"state_num_groups": 3}, r"state_num_groups=3 does not divide state_num_heads=4"),
        ({"hidden_size": "32"}, r"'hidden_size' expected int, got str"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads=3 does not divide num_attention_heads=4"),
    ],
)
def test_errors_name_field_value_and_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)
