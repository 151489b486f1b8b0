"""config.json: by hand what an export says, with values that no class takes by itself; and where it does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteMoeHybridConfig, LlamaConfig

from megatron_txssm.cli.main import main
from megatron_txssm.convert.formats.config import hf_config
from megatron_txssm.convert.formats.config_check import read_config
from megatron_txssm.convert.huggingface.folder import open_hf_folder
from megatron_txssm.errors import UserError
from tests.convert.formats.test_mapping import load
from tests.convert.trained import ARCHITECTURES, EXPERT_ARCHITECTURES, REFERENCE
from tests.convert.untrained import make_run

# Format -> recipe, its changes, what config.json must say. Sizes are SMALL's of test_mapping.
_OWN = "norm_epsilon=3e-4 rotary_base=7000 init_method_std=0.03"
_COMMON = {
    "vocab_size": 245,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-4,
    "initializer_range": 0.03,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "dtype": "float32",
}
_LINEAR = {"rope_type": "linear", "rope_theta": 7000.0, "factor": 3.0}
_DEFAULT = {"rope_type": "default", "rope_theta": 7000.0}
_GRANITE: dict[str, Any] = _COMMON | {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "head_dim": 8,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "rope_parameters": _DEFAULT,
    "rope_theta": 7000.0,
    "rope_scaling": None,
    "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2,
    "position_embedding_type": "rope",
    "shared_intermediate_size": 80,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 8**-0.5,
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_n_groups": 2,
    "mamba_d_state": 20,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
# The first word is the format.
BY_HAND: dict[str, tuple[str, str, dict[str, Any]]] = {
    "transxssm": (
        "gated rope",
        f"{_OWN} length_scaling_base=17 rope_scaling=linear rotary_interpolation_factor=3 chunk_size=32 "
        "rotary_table_precision=fp64",
        _COMMON
        | {
            "architectures": ["TransXSSMForCausalLM"],
            "model_type": "transxssm",
            "head_dim": 8,
            "rope_parameters": _LINEAR,
            "layer_types": ["linear_attention"] * 7 + ["full_attention"],
            "attention_position_encoding": "rope",
            "position_encoding": "rope",
            "state_size": 20,
            "state_num_heads": 4,
            "state_head_dim": 12,
            "state_num_groups": 2,
            "state_gated": True,
            "state_dt_bias": True,
            "conv_kernel": 4,
            "chunk_size": 32,
            "length_scaling_base": 17,
            "rotary_table_precision": "fp64",
        },
    ),
    "llama": (
        "llama3",
        f"{_OWN} rope_scaling=linear rotary_interpolation_factor=3 tie_embeddings=false",
        _COMMON
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": 10,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "rope_parameters": _LINEAR,
            # For readers before `rope_parameters`.
            "rope_theta": 7000.0,
            "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 3.0},
        },
    ),
    "granitemoehybrid": (
        "jamba",
        f"{_OWN} attention_position_encoding=rope layer_pattern=M-M-M-*-M-M-M-*- state_num_heads=8",
        _GRANITE,
    ),
    "transxssm with experts": (
        "some experts",
        f"{_OWN} layer_pattern=M-MEM-*E*EM-MEM- moe_shared_expert_intermediate_size=36 moe_aux_loss_coeff=0.03",
        _COMMON
        | {
            "architectures": ["TransXSSMForCausalLM"],
            "model_type": "transxssm",
            "head_dim": 8,
            "rope_parameters": _DEFAULT,
            "layer_types": [f"{kind}_attention" for kind in ["linear"] * 3 + ["full"] * 2 + ["linear"] * 3],
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse", "dense", "sparse", "dense"],
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 28,
            "shared_expert_intermediate_size": 36,
            "router_aux_loss_coef": 0.03,
            "attention_position_encoding": "rope",
            "position_encoding": "rope",
            "state_size": 20,
            "state_num_heads": 4,
            "state_head_dim": 12,
            "state_num_groups": 2,
            "state_gated": False,
            "state_dt_bias": True,
            "conv_kernel": 4,
            "chunk_size": 256,
            "length_scaling_base": None,
            "rotary_table_precision": "fp32",
        },
    ),
    "granitemoehybrid with experts": (
        "jamba with experts",
        f"{_OWN} attention_position_encoding=rope layer_pattern=MEMEME*EMEMEME*E state_num_heads=8 "
        "moe_aux_loss_coeff=0.03 tie_embeddings=false",
        _GRANITE
        | {
            "intermediate_size": 28,
            "shared_intermediate_size": 36,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "router_aux_loss_coef": 0.03,
        },
    ),
    "reference": (
        "reference",
        _OWN,
        {name: value for name, value in _COMMON.items() if name != "dtype"}
        | {
            "architectures": ["TransXSSMForCausalLM"],
            "model_type": "TransXSSM",
            "num_key_value_heads": 6,
            "attn_layer_period": 8,
            "attn_layer_offset": 7,
            "hidden_act": "silu",
            "hidden_bias": False,
            "rope_theta": 7000.0,
            "rope_scaling": None,
            "dynamic_mask_ratio": 0.0,
            "ssd_chunk_size": 256,
            "hidden_dropout": 0.0,
        },
    ),
}


@pytest.mark.parametrize("model", BY_HAND)
def test_what_an_export_says_by_hand(model: str) -> None:
    variant, changes, wanted = BY_HAND[model]
    recipe = load(variant, changes)
    assert hf_config(recipe, model.split()[0]) == wanted
    assert hf_config(recipe, "megatron") == {}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each format that has a config.json. Copy them before changing them."""
    folder, made = tmp_path_factory.mktemp("configs"), {}
    models = {
        "transxssm": ARCHITECTURES["transxssm"],
        "llama": ARCHITECTURES["llama3"],
        "granitemoehybrid": ARCHITECTURES["jamba"],
        "reference": REFERENCE,
        "transxssm with experts": EXPERT_ARCHITECTURES["experts"],
        "granitemoehybrid with experts": EXPERT_ARCHITECTURES["jamba_experts"],
    }
    for name, model in models.items():
        (folder / name).mkdir()
        run, made[name] = make_run(folder / name, model), folder / name / "out"
        words = ["convert", "export", str(run), str(made[name]), "--layout", name.split()[0], "--no-verify"]
        assert main(words) == 0
    return made


@pytest.fixture
def copied(exports: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of an export, whose config.json gets other values."""

    def copy(model: str, **values: Any) -> Path:
        folder = tmp_path / f"{model}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(exports[model], folder)
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


@pytest.mark.parametrize("model", BY_HAND)
def test_every_field_that_matters_is_compared(copied: Any, model: str) -> None:
    """Whatever else it says is refused: by name, or by the class, where no such model can be."""
    folder, format = copied(model), model.split()[0]
    config = json.loads((folder / "config.json").read_text())
    fields = read_config(folder, config, format)
    if format == "granitemoehybrid":
        # Without positions there is no rotation, whatever the file says.
        unread = [fields.pop("position_embedding_type"), fields.pop("rope_parameters")]
        assert unread == [None, None]
    least = {"transxssm": 20, "llama": 13, "granitemoehybrid": 23, "reference": 15}
    about_experts = {"transxssm": 4, "granitemoehybrid": 2}
    assert len(fields) >= least[format] + (about_experts[format] if model.endswith("with experts") else 0)
    for name, value in fields.items():
        with pytest.raises(UserError) as refused:
            open_hf_folder(copied(model, **{name: another(name, value)}))
        assert f" has {name}=" in str(refused.value) or f"is no {format} configuration" in str(refused.value), name


def another(name: str, value: Any) -> Any:
    if name in ("rope_parameters", "rope_scaling"):
        return {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
    if name == "mlp_layer_types":
        return [{"dense": "sparse", "sparse": "dense"}[kind] for kind in value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, list | tuple):
        return [0.1, 9.0] if name == "time_step_limit" else value[::-1]
    return f"{value}x" if isinstance(value, str) else (value or 0) + 1


def test_what_does_not_matter_may_differ(copied: Any) -> None:
    for model in BY_HAND:
        ignored = {"use_cache": False, "initializer_range": 0.5, "attention_dropout": 0.3, "torch_dtype": "bfloat16"}
        ignored |= {"eos_token_id": 7, "_name_or_path": "x", "temperature": 0.7, "some_switch": False, "a_list": []}
        ignored |= {"chunk_size": 8} if model.startswith("transxssm") else {"max_position_embeddings": 99}
        if model.endswith("with experts"):
            ignored |= {"router_aux_loss_coef": 0.5, "output_router_logits": True}
        elif model.startswith(("transxssm", "granite")):
            # Without experts.
            ignored |= {"num_experts_per_tok": 4}
        open_hf_folder(copied(model, **ignored))


@pytest.mark.parametrize("model", BY_HAND)
def test_what_is_unknown_is_refused(copied: Any, model: str) -> None:
    with pytest.raises(UserError, match=r"config\.json has sliding_window=16, which is unknown here and may change"):
        open_hf_folder(copied(model, sliding_window=16))
    for extra in ({"rope_type": "default", "partial_rotary_factor": 0.5}, {"rope_type": "linear", "factor": 2.0}):
        with pytest.raises(UserError, match="rope_"):
            open_hf_folder(copied("llama", rope_parameters=extra | {"rope_theta": 500.0}))
    open_hf_folder(copied("llama", rope_parameters={"rope_type": "default", "type": "default", "rope_theta": 500.0}))


def test_the_authors_defaults_hold_where_their_file_is_silent(copied: Any) -> None:
    folder = copied("reference")
    config = json.loads((folder / "config.json").read_text())
    silent = {name: value for name, value in config.items() if name not in ("attn_layer_period", "hidden_act")}
    (folder / "config.json").write_text(json.dumps(silent))
    open_hf_folder(folder)
    for name, said in (
        ("rope_scaling", "'rope_type': 'dynamic'"),
        ("rms_norm_eps", "1e-06"),
        ("rope_theta", "10000.0"),
    ):
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != name}))
        with pytest.raises(UserError, match=f"has {name}=.*{said}"):
            open_hf_folder(folder)


def test_weights_without_a_configuration_are_taken_with_a_warning(
    copied: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("reference")
    (folder / "config.json").unlink()
    open_hf_folder(folder)
    assert "has no config.json: that its rotary base, epsilon and heads are those" in capsys.readouterr().err


@pytest.mark.parametrize(("format", "embedding"), [("reference", "word_embed"), ("transxssm", "embed_tokens")])
def test_an_lm_head_of_its_own_is_no_tied_one(copied: Any, format: str, embedding: str) -> None:
    folder = copied(format)
    tensors = load_file(folder / "model.safetensors")
    rows = tensors[f"model.{embedding}.weight"]
    save_file(tensors | {"lm_head.weight": rows.clone()}, folder / "model.safetensors")
    assert "lm_head.weight" not in open_hf_folder(folder).index
    save_file(tensors | {"lm_head.weight": rows + torch.eye(*rows.shape)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"lm_head.weight holds other values than model.{embedding}.weight"):
        open_hf_folder(folder)


def test_what_transformers_itself_saved_is_read(copied: Any) -> None:
    """Infinity as an object, its own names of layers, no field that holds what the class takes by itself."""
    folder = copied("granitemoehybrid")
    GraniteMoeHybridConfig.from_pretrained(folder).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert saved["layer_types"][0] == "linear_attention"
    open_hf_folder(folder)
    renamed = {name: value for name, value in saved.items() if name not in ("layer_types", "head_dim")}
    # As Granite 4 has it where there are no positions; and its FFN beside the experts.
    renamed |= {"layers_block_type": saved["layer_types"], "position_embedding_type": "nope", "intermediate_size": 9}
    (folder / "config.json").write_text(json.dumps(renamed | {"normalization_function": "rmsnorm"}))
    open_hf_folder(folder)
    with pytest.raises(UserError, match="has normalization_function='layernorm', which is unknown"):
        open_hf_folder(copied("granitemoehybrid", normalization_function="layernorm"))


def test_a_rotation_is_read_under_its_older_names(copied: Any) -> None:
    folder = copied("llama")
    LlamaConfig.from_pretrained(folder).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    base = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": base, "rope_scaling": None}))
    open_hf_folder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has rope_parameters="):
        open_hf_folder(folder)
