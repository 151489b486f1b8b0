"""Checks that a folder's config.json describes the same computation as a recipe.

Every key must be compared, known not to affect the computation, or rejected.
"""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_txssm.convert.formats.config import REFERENCE_TYPE, Fields, hf_config
from megatron_txssm.errors import UserError
from megatron_txssm.files import JsonObject
from megatron_txssm.recipe.recipe import Recipe

# Keys about training, use and origin.
_NO_MATTER = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "model_type", "name_or_path", "tokenizer_class"),
    *("transformers_version", "transformers.js_config", "unsloth_version", "unsloth_fixed", "is_llama_config"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "num_labels", "problem_type"),
    *("max_position_embeddings", "initializer_range", "init_method", "attention_dropout", "hidden_dropout"),
    *("chunk_size", "mamba_chunk_size", "ssd_chunk_size", "pretraining_tp"),
    *("output_router_logits", "router_aux_loss_coef"),
}
# Keys that transformers reads into other fields, which are compared.
_READ_ELSEWHERE = {"rope_theta", "rope_scaling", "partial_rotary_factor", "layers_block_type", "head_dim"}
# Fields that have no effect without experts: Granite's FFN is the shared one.
_ABOUT_EXPERTS = {
    "granitemoehybrid": {"intermediate_size", "num_experts_per_tok"},
    "transxssm": {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"},
}
# Keys that some writers add, with the value that has no effect.
_AS_ALWAYS = {"normalization_function": "rmsnorm"}
# Defaults of the authors' class.
_REFERENCE_DEFAULTS: JsonObject = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": None,
    "attn_layer_period": 8,
    "attn_layer_offset": 7,
    "hidden_act": "silu",
    "hidden_bias": False,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "dynamic_mask_ratio": 0.0,
}


def check_config(folder: Path, config: JsonObject, recipe: Recipe, format: str, remedy: str) -> None:
    """UserError if config.json describes another computation than the recipe, even with the same shapes.

    `config`: its content. `remedy`: advice for the user.
    """
    ours, theirs = _ours(recipe, format), read_config(folder, config, format)
    for name, value in ours.items():
        if name in theirs and theirs[name] != value:
            raise UserError(
                f"{folder / 'config.json'} has {name}={theirs[name]!r}, where recipe {recipe.name} asks for {value!r}; "
                f"{remedy}"
            )


def read_config(folder: Path, config: JsonObject, format: str) -> Fields:
    """The fields of a folder's config.json that determine a model's function; UserError for unknown ones.

    `config`: its content.
    """
    file = folder / "config.json"
    model_type = REFERENCE_TYPE if format == "reference" else format
    if config.get("model_type") != model_type:
        raise UserError(f"{file} has model_type={config.get('model_type')!r}, not {model_type!r}")
    if config.get("quantization_config"):
        raise UserError(f"{folder} is a quantized model; import the one that it was made from")
    found = _reference_fields(config) if format == "reference" else _load(folder, format)
    for name, value in config.items():
        known = name in found or name in _NO_MATTER | _READ_ELSEWHERE or name in _generation_settings()
        harmless = not value or name.startswith("_") or _AS_ALWAYS.get(name) == value
        if not known and not harmless and name not in _ABOUT_EXPERTS.get(format, set()):
            raise UserError(
                f"{file} has {name}={value!r}, which is unknown here and may change what the model computes; "
                "if it does not, import a copy of the folder without it"
            )
    return found


def _ours(recipe: Recipe, format: str) -> Fields:
    """The result of `read_config` for an export of the recipe's model."""
    config = hf_config(recipe, format)
    return _reference_fields(config) if format == "reference" else _fields(_class(format)(**config), format)


def _load(folder: Path, format: str) -> Fields:
    """The fields of a folder's config.json as transformers reads them."""
    try:
        return _fields(_class(format).from_pretrained(folder, local_files_only=True), format)
    except Exception as error:  # transformers may raise anything for an invalid value
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.json'} is no {format} configuration: {reason}") from None


def _class(format: str) -> Any:
    from transformers import GraniteMoeHybridConfig, LlamaConfig

    from megatron_txssm.hf import TransXSSMConfig

    return {"llama": LlamaConfig, "granitemoehybrid": GraniteMoeHybridConfig, "transxssm": TransXSSMConfig}[format]


def _fields(config: Any, format: str) -> Fields:
    """The fields of a transformers configuration that affect the computation."""
    names = {field.name for field in dataclasses.fields(config)} - _NO_MATTER
    if not getattr(config, "num_local_experts" if format == "granitemoehybrid" else "has_experts", False):
        names -= _ABOUT_EXPERTS.get(format, set())
    found = {name: getattr(config, name) for name in sorted(names)}
    # Granite's class reads it, but has no field for it.
    found["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found["rope_parameters"] = {
        name: value
        for name, value in config.rope_parameters.items()
        if value is not None and name != "type" and (name, value) != ("partial_rotary_factor", 1)
    }
    if format == "granitemoehybrid" and found["position_embedding_type"] != "rope":
        # Any other value, such as "nope", means no positions.
        found |= {"position_embedding_type": None, "rope_parameters": None}
    return found


def _reference_fields(config: JsonObject) -> Fields:
    """The same for the authors' configuration, whose class is not available here."""
    found: Fields = {name: config.get(name, default) for name, default in _REFERENCE_DEFAULTS.items()}
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    scaling = found["rope_scaling"]
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        found["rope_scaling"] = None
    return found


def _generation_settings() -> set[str]:
    """Older versions of transformers keep them in config.json, newer ones drop them when reading it."""
    from transformers import GenerationConfig

    return set(GenerationConfig().to_dict())
