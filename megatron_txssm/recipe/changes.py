"""Typed replacement of recipe fields, and the changes shared by several packages."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from megatron_txssm.architecture.layer_pattern import without_depths
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIELDS

# Dotted field -> value; fields outside of sections have no dot.
Changes = dict[str, Any]

WITHOUT_FP8: Changes = {
    "training.fp8": None,
    "training.fp8_recipe": "delayed",
    "training.fp8_attention": False,
    "training.first_last_layers_bf16": 0,
}
# Nor what concerns single steps of the whole training.
WITHOUT_REPORTS: Changes = {
    "logging.tensorboard": False,
    "logging.wandb_project": None,
    "logging.mlflow_experiment": None,
    "guard.spike_action": None,
    "evaluation.tasks": None,
    "evaluation.interval": None,
    "data.skip_steps": None,
}
# Every kind of data, and its mixture.
WITHOUT_TOKENS: Changes = dict.fromkeys(
    f"data.{name}" for name in ("corpus", "weights", "stages", "train", "validation", "blend", "split", "recall_pairs")
)
WITHOUT_TOKENIZER: Changes = {"data.tokenizer_type": "NullTokenizer", "data.tokenizer_model": None}
ONE_MODEL_PARALLEL_RANK: Changes = {
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.virtual_pipeline_stages": None,
    "parallel.context_parallel_size": 1,
    "parallel.expert_model_parallel_size": 1,
    "parallel.sequence_parallel": False,
}


def without_prediction(recipe: Recipe) -> Recipe:
    """The recipe of the model without multi-token prediction, whose depths only serve training."""
    pattern, weight = without_depths(recipe.model.layer_pattern), FIELDS["model"]["mtp_loss_scaling_factor"].default
    return changed(recipe, {"model.layer_pattern": pattern, "model.mtp_loss_scaling_factor": weight})


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with some fields replaced, unchecked; None in its `megatron:` section removes an entry."""
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        section, dot, name = dotted.partition(".")
        if dot:
            sections.setdefault(section, {})[name] = value
        else:
            top[section] = value
    megatron = recipe.megatron | sections.pop("megatron", {})
    return dataclasses.replace(
        recipe,
        **top,
        **{name: dataclasses.replace(getattr(recipe, name), **fields) for name, fields in sections.items()},
        megatron={name: value for name, value in megatron.items() if value is not None},
    )


def differences(recipes: Sequence[Recipe], but: Collection[str] = ()) -> dict[str, list[Any]]:
    """Dotted field -> its value in each recipe, for the fields that differ, except those named in `but`."""
    flat = [_flat(recipe) for recipe in recipes]
    names = [name for name in dict.fromkeys(name for fields in flat for name in fields) if name not in but]
    values = {name: [fields.get(name) for fields in flat] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _flat(recipe: Recipe) -> Changes:
    """Dotted field -> value, of all fields."""
    found: Changes = {}
    for section, value in dataclasses.asdict(recipe).items():
        found |= (
            {f"{section}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {section: value}
        )
    return found
