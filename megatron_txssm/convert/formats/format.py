"""The formats of a conversion (`--layout`), and the models that each can represent.

transxssm         our transformers model (hf/); every model of a recipe
llama             transformers' LlamaForCausalLM: attention with RoPE in every layer
granitemoehybrid  transformers' GraniteMoeHybridForCausalLM, which covers the Mamba-2 and Jamba baselines, also with
                  experts and a shared expert in every block
reference         the authors' public code (arXiv:2506.09507)
megatron          Megatron's own names; only weights
"""

from typing import Literal, get_args

from megatron_txssm.architecture.layer_pattern import ATTENTION, FFN
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe

Format = Literal["transxssm", "llama", "granitemoehybrid", "reference", "megatron"]
FORMATS: tuple[Format, ...] = get_args(Format)
# Formats that transformers can load, with the class in their config.json.
ARCHITECTURES = {
    "transxssm": "TransXSSMForCausalLM",
    "llama": "LlamaForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
}

_EXPERTS = "it has layers of experts"


def choose_format(recipe: Recipe, asked: Format | None) -> Format:
    """`asked`; None: llama if the model is one, otherwise transxssm. UserError with the reason if it does not fit."""
    if asked != "megatron" and recipe.model.ablation is not None:
        raise UserError(
            f"{recipe.name} has model.ablation={recipe.model.ablation}, for which there is no Hugging Face format; "
            "--layout megatron exports its weights"
        )
    if asked != "megatron":
        # Raises UserError itself if the layers are no blocks.
        _ = recipe.blocks
    if asked is None:
        return "llama" if refusal(recipe, "llama") is None else "transxssm"
    if reason := refusal(recipe, asked):
        raise UserError(f"--layout {asked} cannot hold {recipe.name}: {reason}; leave --layout out")
    return asked


def refusal(recipe: Recipe, format: str) -> str | None:
    """Why a format cannot represent a recipe's model; None if it can."""
    checks = {"llama": _llama_misfits, "granitemoehybrid": _granite_misfits, "reference": _reference_misfits}
    if format not in checks:
        return None
    return next((reason for misfit, reason in checks[format](recipe) if misfit), None)


def _llama_misfits(recipe: Recipe) -> list[tuple[bool, str]]:
    model = recipe.model
    return [
        (recipe.has_state_space, "it has state-space layers"),
        (recipe.has_experts, _EXPERTS),
        (model.attention_position_encoding != "rope", "its attention has no rotary positions"),
        (model.rotary_table_precision != "fp32", "its rotary angles are computed in fp64"),
    ]


def _granite_misfits(recipe: Recipe) -> list[tuple[bool, str]]:
    model, mixer = recipe.model, recipe.state_space
    if mixer is None:
        return [(True, "it has no state-space layers")]
    rotates = recipe.has_attention and model.attention_position_encoding == "rope"
    experts = recipe.experts
    return [
        (mixer.position_encoding != "conv1d_d", "its state-space layers have no convolution and no skip D"),
        (not mixer.gated, "its state-space layers have no gate"),
        (not mixer.dt_bias, "its dt has no bias"),
        (mixer.length_scaling_base is not None, "it scales C by the position (length_scaling_base)"),
        (mixer.inner_size % model.hidden_size != 0, "its state-space heads are no multiple of hidden_size"),
        (rotates and model.rotary_table_precision != "fp32", "its rotary angles are computed in fp64"),
        (
            experts is not None and FFN in recipe.layers,
            "some of its blocks have experts and others an FFN, where this class has the same in every block",
        ),
        (
            experts is not None and not experts.shared_ffn_hidden_size,
            "its blocks have no shared expert (moe_shared_expert_intermediate_size), which this class always has",
        ),
    ]


def _reference_misfits(recipe: Recipe) -> list[tuple[bool, str]]:
    model, mixer, kinds = recipe.model, recipe.state_space, recipe.blocks
    if mixer is None:
        return [(True, "it has no state-space layers")]
    head_dim = model.hidden_size // model.num_attention_heads
    sizes = {"state_size": mixer.state_size, "state_head_dim": mixer.head_dim, "kv_channels": recipe.kv_channels}
    other = next((f"{name}={size}" for name, size in sizes.items() if size != head_dim), "")
    misplaced = any((kind == ATTENTION) != (layer % 8 == 7) for layer, kind in enumerate(kinds))
    return [
        (recipe.has_experts, _EXPERTS),
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
