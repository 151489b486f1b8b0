"""A recipe for a model without one: config.json determines the model, one of our recipes the training."""

import re
from pathlib import Path

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.convert.formats.config import Fields
from megatron_txssm.convert.formats.config_check import read_config
from megatron_txssm.errors import UserError, shown
from megatron_txssm.files import JsonObject
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import SECTIONS
from megatron_txssm.recipe.settings.setting import convert, section_fields
from megatron_txssm.recipe.validation.validate import validate

# The recipe that provides the training settings until the user changes them.
_TRAINING = "llama3_1.3b"
_LAYERS = {"linear_attention": STATE_SPACE, "full_attention": ATTENTION, "dense": FFN, "sparse": EXPERTS}


def recipe_of_config(folder: Path, config: JsonObject, format: str) -> Recipe:
    """The recipe of a folder whose config.json contains `config`; UserError if no recipe can express it.

    `check_config` finds settings that are not expressed here.
    """
    found = read_config(folder, config, format)
    describe = {"llama": _llama, "granitemoehybrid": _granite, "transxssm": _transxssm, "reference": _reference}
    model = _rotation(folder, found) | {
        "hidden_size": found["hidden_size"],
        "num_attention_heads": found["num_attention_heads"],
        "num_query_groups": found["num_key_value_heads"],
        "norm_epsilon": found["rms_norm_eps"],
        "tie_embeddings": found["tie_word_embeddings"],
        "init_method_std": config.get("initializer_range", 0.02),
        **describe[format](found, config),
    }
    name = re.sub(r"[^\w.-]+", "_", folder.absolute().name).strip("._-") or format
    longest = config.get("max_position_embeddings") or 4096
    changes: Changes = {
        **{f"model.{field}": value for field, value in model.items()},
        "data.vocab_size": found["vocab_size"],
        # No corpus with this model's tokenizer exists yet.
        "data.corpus": f"data/{name}",
        "data.weights": None,
        # A power of two: the model's maximum, limited to the recipe's.
        "training.seq_length": min(4096, 1 << (longest.bit_length() - 1)) if isinstance(longest, int) else 4096,
    }
    try:
        described: Changes = {"name": name, "description": f"of a {format} folder's config.json"}
        recipe = changed(load_recipe(_TRAINING), described | _converted(changes))
        validate(recipe)
        return recipe
    except UserError as error:
        raise UserError(f"{folder / 'config.json'} describes a model that no recipe can: {error}") from None


def _converted(changes: Changes) -> Changes:
    """Each value as its field's type; UserError if it has another one or exceeds the field's limits."""
    fields = {f"{name}.{field.name}": field for name, section in SECTIONS.items() for field in section_fields(section)}
    converted: Changes = {}
    for name, value in changes.items():
        try:
            converted[name] = convert(value, fields[name])
        except ValueError as error:
            raise UserError(f"{name}={shown(value)} {error}") from None
    return converted


def _rotation(folder: Path, found: Fields) -> Changes:
    rope = found.get("rope_parameters") or {"rope_theta": found.get("rope_theta", 10_000)}
    kind, numbers = rope.get("rope_type", "default"), {"rotary_base": rope["rope_theta"]}
    if kind == "linear":
        numbers["rotary_interpolation_factor"] = rope["factor"]
    elif kind != "default" or found.get("rope_scaling"):
        kind = (found.get("rope_scaling") or rope).get("rope_type")
        raise UserError(f"{folder / 'config.json'} has rope_type={kind!r}, which no recipe has; linear and default are")
    for name, number in numbers.items():
        if number != int(number):
            raise UserError(f"{folder / 'config.json'}: {name}={number!r} is no whole number, which a recipe asks for")
    scaling = {"rope_scaling": "linear"} if kind == "linear" else {}
    return scaling | {name: int(number) for name, number in numbers.items()}


def _llama(found: Fields, config: JsonObject) -> Changes:
    return {
        "layer_pattern": (ATTENTION + FFN) * found["num_hidden_layers"],
        "kv_channels": found["head_dim"],
        "ffn_hidden_size": found["intermediate_size"],
    }


def _pattern(mixers: list[str], ffns: list[str]) -> str:
    return "".join(_LAYERS[kind] for block in zip(mixers, ffns, strict=True) for kind in block)


def _granite(found: Fields, config: JsonObject) -> Changes:
    count = found["num_local_experts"]
    experts: Changes = {}
    if count:
        experts = {
            "num_experts": count,
            "moe_router_topk": found["num_experts_per_tok"],
            "moe_ffn_hidden_size": found["intermediate_size"],
            "moe_shared_expert_intermediate_size": found["shared_intermediate_size"],
            "moe_aux_loss_coeff": config.get("router_aux_loss_coef", 0.001),
        }
    return {
        "layer_pattern": _pattern(found["layer_types"], ["sparse" if count else "dense"] * len(found["layer_types"])),
        "kv_channels": found["head_dim"],
        "ffn_hidden_size": found["shared_intermediate_size"],
        "attention_position_encoding": "rope" if found["position_embedding_type"] == "rope" else "none",
        "position_encoding": "conv1d_d",
        "state_gated": True,
        "state_size": found["mamba_d_state"],
        "state_num_heads": found["mamba_n_heads"],
        "state_head_dim": found["mamba_d_head"],
        "state_num_groups": found["mamba_n_groups"],
        "chunk_size": config.get("mamba_chunk_size", 256),
        **experts,
    }


def _transxssm(found: Fields, config: JsonObject) -> Changes:
    same = ("attention_position_encoding", "position_encoding", "state_size", "state_num_heads", "state_head_dim")
    same += ("state_num_groups", "state_gated", "state_dt_bias", "length_scaling_base", "rotary_table_precision")
    experts: Changes = {}
    if "num_experts" in found:
        experts = {
            "num_experts": found["num_experts"],
            "moe_router_topk": found["num_experts_per_tok"],
            "moe_ffn_hidden_size": found["moe_intermediate_size"],
            "moe_shared_expert_intermediate_size": found["shared_expert_intermediate_size"] or None,
            "moe_aux_loss_coeff": config.get("router_aux_loss_coef", 0.01),
        }
    return {
        "layer_pattern": _pattern(found["layer_types"], found["mlp_layer_types"]),
        "kv_channels": found["head_dim"],
        "ffn_hidden_size": found["intermediate_size"],
        "chunk_size": config.get("chunk_size", 256),
        **experts,
        **{name: found[name] for name in same},
    }


def _reference(found: Fields, config: JsonObject) -> Changes:
    heads = found["num_attention_heads"]
    channels = found["hidden_size"] // heads
    period, offset = found["attn_layer_period"], found["attn_layer_offset"]
    mixers = (ATTENTION if layer % period == offset else STATE_SPACE for layer in range(found["num_hidden_layers"]))
    return {
        "layer_pattern": "".join(mixer + FFN for mixer in mixers),
        "ffn_hidden_size": found["intermediate_size"],
        "state_size": channels,
        "state_head_dim": channels,
        "state_num_groups": heads,
        "state_dt_bias": False,
        "chunk_size": config.get("ssd_chunk_size", 256),
    }
