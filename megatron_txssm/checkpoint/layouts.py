"""The layouts of a conversion: which model each can hold, and the config.json that describes the model in it.

transxssm         our transformers model (hf/); every model of a recipe
llama             transformers' LlamaForCausalLM: attention with RoPE in every layer
granitemoehybrid  transformers' GraniteMoeHybridForCausalLM, of which the Mamba-2 and Jamba baselines are instances
reference         the parameter names of the authors' public code (arXiv:2506.09507); weights alone
megatron          Megatron's own names; weights alone
"""

from typing import Any

from megatron_txssm.checkpoint.mapping import TABLES
from megatron_txssm.errors import UserError
from megatron_txssm.model.layer_pattern import ATTENTION, STATE_SPACE
from megatron_txssm.recipe.recipe import Recipe

LAYOUTS = (*TABLES, "megatron")
# Those that transformers can load, with the architecture in their config.json.
ARCHITECTURES = {
    "transxssm": "TransXSSMForCausalLM",
    "llama": "LlamaForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
}
_LAYER_TYPES = {STATE_SPACE: "linear_attention", ATTENTION: "full_attention"}


def choose_layout(recipe: Recipe, asked: str | None) -> str:
    """`asked`, or else llama where the model is one and transxssm where not; UserError with the reason for a misfit."""
    if asked is None:
        return "llama" if refusal(recipe, "llama") is None else "transxssm"
    if reason := refusal(recipe, asked):
        raise UserError(f"--layout {asked} cannot hold {recipe.name}: {reason}; leave --layout out")
    return asked


def refusal(recipe: Recipe, layout: str) -> str | None:
    """Why a layout cannot hold a recipe's model; None where it can."""
    checks = {"llama": _llama_misfits, "granitemoehybrid": _granite_misfits, "reference": _reference_misfits}
    if layout not in checks:
        return None
    return next((reason for misfit, reason in checks[layout](recipe) if misfit), None)


def _llama_misfits(recipe: Recipe) -> list[tuple[bool, str]]:
    model = recipe.model
    return [
        (recipe.has_state_space, "it has state-space layers"),
        (model.attention_position_encoding != "rope", "its attention has no rotary positions"),
        (model.rotary_table_precision != "fp32", "its rotary angles are computed in fp64"),
    ]


def _granite_misfits(recipe: Recipe) -> list[tuple[bool, str]]:
    model, mixer = recipe.model, recipe.state_space
    if mixer is None:
        return [(True, "it has no state-space layers")]
    rotates = recipe.has_attention and model.attention_position_encoding == "rope"
    return [
        (mixer.position_encoding != "conv1d_d", "its state-space layers have no convolution and no skip D"),
        (not mixer.gated, "its state-space layers have no gate"),
        (not mixer.dt_bias, "its dt has no bias"),
        (mixer.length_scaling_base is not None, "it scales C by the position (length_scaling_base)"),
        (mixer.inner_size % model.hidden_size != 0, "its state-space heads are no multiple of hidden_size"),
        (rotates and model.rotary_table_precision != "fp32", "its rotary angles are computed in fp64"),
    ]


def _reference_misfits(recipe: Recipe) -> list[tuple[bool, str]]:
    model, mixer, kinds = recipe.model, recipe.state_space, recipe.layer_kinds
    if mixer is None:
        return [(True, "it has no state-space layers")]
    head_dim = model.hidden_size // model.num_attention_heads
    sizes = {"state_size": mixer.state_size, "state_head_dim": mixer.head_dim, "kv_channels": recipe.kv_channels}
    other = next((f"{name}={size}" for name, size in sizes.items() if size != head_dim), "")
    misplaced = any((kind == ATTENTION) != (layer % 8 == 7) for layer, kind in enumerate(kinds))
    return [
        (misplaced, "its attention layers are others than every eighth"),
        (
            mixer.position_encoding != "rope",
            f"its state-space layers have position_encoding: {mixer.position_encoding}",
        ),
        (model.attention_position_encoding != "rope", "its attention has no rotary positions"),
        (bool(other), f"{other} is not hidden_size / num_attention_heads={head_dim}"),
        (
            mixer.num_groups != mixer.num_heads,
            f"its {mixer.num_heads} heads share {mixer.num_groups} groups",
        ),
        (model.num_query_groups not in (None, model.num_attention_heads), "its attention has grouped queries"),
        (mixer.gated, "its state-space layers have a gate"),
        (mixer.dt_bias, "its dt has a bias (train with model.state_dt_bias: false)"),
        (mixer.length_scaling_base is not None, "it scales C by the position (length_scaling_base)"),
        (model.rope_scaling != "none", f"it has rope_scaling: {model.rope_scaling}"),
        (model.rotary_table_precision != "fp32", "its rotary angles are computed in fp64"),
        (not model.tie_embeddings, "its LM head is not tied to the embedding"),
    ]


def hf_config(recipe: Recipe, layout: str, dtype: str = "float32") -> dict[str, Any]:
    """What config.json says of a model; `layout` is one of ARCHITECTURES. Every rotary setting is stated."""
    model = recipe.model
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.rope_scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(model.rotary_interpolation_factor or 1)}
    common = {
        "architectures": [ARCHITECTURES[layout]],
        "model_type": layout,
        "vocab_size": recipe.data.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": recipe.kv_channels,
        "rope_parameters": rope,
        "max_position_embeddings": recipe.training.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
    }
    stock = {"attention_bias": False, "hidden_act": "silu"}
    if layout == "llama":
        return common | stock | {"mlp_bias": False}
    return common | (_transxssm(recipe) if layout == "transxssm" else stock | _granite(recipe))


def _transxssm(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model
    return {
        "layer_types": [_LAYER_TYPES[kind] for kind in recipe.layer_kinds],
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
    }


def _granite(recipe: Recipe) -> dict[str, Any]:
    """Without experts, its layers are a mixer and the shared FFN; every multiplier that Granite has is one."""
    mixer, rotates = recipe.state_space, recipe.model.attention_position_encoding == "rope"
    assert mixer is not None
    return {
        "layer_types": [_LAYER_TYPES[kind] for kind in recipe.layer_kinds],
        "position_embedding_type": "rope" if rotates else None,
        "shared_intermediate_size": recipe.model.ffn_hidden_size,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
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
        # transformers' cache cannot say how long it is without an attention layer: without it, generate() runs.
        "use_cache": recipe.has_attention,
        "mamba_proj_bias": False,
    }
