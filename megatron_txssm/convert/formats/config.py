"""config.json for a recipe's model, in every format that has one."""

from typing import Any

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.convert.formats.format import ARCHITECTURES
from megatron_txssm.recipe.recipe import Recipe

# Name -> value, in the types that a format's configuration class asks for.
Fields = dict[str, Any]
# model_type in the authors' configuration.
REFERENCE_TYPE = "TransXSSM"
_LAYER_TYPES = {STATE_SPACE: "linear_attention", ATTENTION: "full_attention"}
_MLP_LAYER_TYPES = {FFN: "dense", EXPERTS: "sparse"}
# Granite's own names. transformers reads them as those above since 5.13; llama.cpp only knows these.
_GRANITE_LAYER_TYPES = {STATE_SPACE: "mamba", ATTENTION: "attention"}


def hf_config(recipe: Recipe, format: str, dtype: str = "float32") -> Fields:
    """The content of config.json, with every rotary setting; empty for a format without config.json."""
    if format == "reference":
        return _reference(recipe)
    if format not in ARCHITECTURES:
        return {}
    model = recipe.model
    rope: Fields = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.rope_scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(model.rotary_interpolation_factor or 1)}
    common: Fields = {
        "architectures": [ARCHITECTURES[format]],
        "model_type": format,
        **_everywhere(recipe),
        "head_dim": recipe.kv_channels,
        "rope_parameters": rope,
        "dtype": dtype,
    }
    if format == "transxssm":
        return common | _transxssm(recipe)
    common |= {"attention_bias": False, "hidden_act": "silu"} | _older_names(rope)
    return common | ({"mlp_bias": False} if format == "llama" else _granite(recipe))


def _everywhere(recipe: Recipe) -> Fields:
    """Fields with the same name in every format."""
    model = recipe.model
    return {
        "vocab_size": recipe.data.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": len(recipe.blocks),
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "max_position_embeddings": recipe.training.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }


def _older_names(rope: Fields) -> Fields:
    """The rotation for readers that do not know `rope_parameters` and would use base 10,000 without scaling."""
    scaling = {"type": rope["rope_type"]} | {name: value for name, value in rope.items() if name != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if scaling["type"] == "default" else scaling}


def _transxssm(recipe: Recipe) -> Fields:
    model = recipe.model
    return {
        "layer_types": [_LAYER_TYPES[kind] for kind in recipe.blocks],
        "attention_position_encoding": model.attention_position_encoding,
        "position_encoding": model.position_encoding,
        "state_size": model.state_size,
        "state_num_heads": model.state_num_heads or model.hidden_size // model.state_head_dim,
        "state_head_dim": model.state_head_dim,
        "state_num_groups": model.state_num_groups,
        "state_gated": model.state_gated,
        "state_dt_bias": model.state_dt_bias,
        "conv_kernel": recipe.state_space.conv_kernel if recipe.state_space else 4,
        "chunk_size": model.chunk_size,
        "length_scaling_base": model.length_scaling_base,
        "rotary_table_precision": model.rotary_table_precision,
        **_transxssm_experts(recipe),
    }


def _transxssm_experts(recipe: Recipe) -> Fields:
    if (experts := recipe.experts) is None:
        return {}
    return {
        "mlp_layer_types": [_MLP_LAYER_TYPES[kind] for kind in recipe.layers[1::2]],
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.topk,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "router_aux_loss_coef": recipe.model.moe_aux_loss_coeff,
    }


def _granite(recipe: Recipe) -> Fields:
    """Its layers are a mixer and the shared FFN, with or without experts beside it; its multipliers have no effect."""
    mixer, rotates = recipe.state_space, recipe.model.attention_position_encoding == "rope"
    assert mixer is not None
    return {
        "layer_types": [_GRANITE_LAYER_TYPES[kind] for kind in recipe.blocks],
        "position_embedding_type": "rope" if rotates else None,
        **_granite_experts(recipe),
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": recipe.kv_channels**-0.5,
        "mamba_n_heads": mixer.num_heads,
        "mamba_d_head": mixer.head_dim,
        "mamba_n_groups": mixer.num_groups,
        "mamba_d_state": mixer.state_size,
        "mamba_d_conv": mixer.conv_kernel,
        "mamba_expand": mixer.inner_size // recipe.model.hidden_size,
        "mamba_chunk_size": mixer.chunk_size,
        "mamba_conv_bias": True,
        # Without attention layers, transformers' cache does not know its length; generate() works without a cache.
        "use_cache": recipe.has_attention,
        "mamba_proj_bias": False,
    }


def _granite_experts(recipe: Recipe) -> Fields:
    if (experts := recipe.experts) is None:
        ffn = recipe.model.ffn_hidden_size
        return {"shared_intermediate_size": ffn, "num_local_experts": 0, "num_experts_per_tok": 0}
    return {
        "intermediate_size": experts.ffn_hidden_size,
        "shared_intermediate_size": experts.shared_ffn_hidden_size,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.topk,
        "router_aux_loss_coef": recipe.model.moe_aux_loss_coeff,
    }


def _reference(recipe: Recipe) -> Fields:
    """The authors' class has no fields for settings that all of its models share."""
    return {
        "architectures": ["TransXSSMForCausalLM"],
        "model_type": REFERENCE_TYPE,
        **_everywhere(recipe),
        "attn_layer_period": 8,
        "attn_layer_offset": 7,
        "hidden_act": "silu",
        "hidden_bias": False,
        "rope_theta": float(recipe.model.rotary_base),
        # The authors' default is "dynamic".
        "rope_scaling": None,
        "dynamic_mask_ratio": 0.0,
        "ssd_chunk_size": recipe.model.chunk_size,
        "hidden_dropout": 0.0,
    }
