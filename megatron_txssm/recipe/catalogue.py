"""Prints the recipes there are, and the fields of a recipe."""

import json
from pathlib import Path

from megatron_txssm.architecture.layer_pattern import EXPERTS, FFN, repeated_part
from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.home import BATCH_SCRIPTS
from megatron_txssm.recipe.loader import RECIPES_OF_RUNS, load_recipe, recipe_names
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIELDS
from megatron_txssm.recipe.settings.setting import table
from megatron_txssm.terminal import print_table


def _folded(layers: str) -> str:
    part = repeated_part(layers)
    return f"{len(layers) // len(part)} x {part}"


def _ffn(recipe: Recipe) -> str:
    """Channels of each kind of FFN that the recipe has."""
    experts = recipe.experts
    kinds = {FFN: f"{recipe.model.ffn_hidden_size}"}
    if experts is not None:
        shared = f" + {experts.shared_ffn_hidden_size}" if experts.shared_ffn_hidden_size else ""
        kinds[EXPERTS] = f"{experts.num_experts} x {experts.ffn_hidden_size}{shared}"
    return ", ".join(text for layer, text in kinds.items() if layer in recipe.layers)


def show_recipes() -> int:
    """Print a table of all recipes with their sizes; returns the exit code."""
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        training, count = recipe.training, count_parameters(recipe.sizes)
        rows.append(
            (
                name,
                _folded(recipe.layers),
                str(recipe.model.hidden_size),
                _ffn(recipe),
                f"{count.total / 1e6:,.1f}M",
                f"{count.active / 1e6:,.1f}M" if count.inactive else "",
                f"{training.seq_length:,}",
                f"{training.global_batch_tokens:,}",
                f"{recipe.optimizer.learning_rate:g}",
                recipe.description,
            )
        )
    print_table(
        ("recipe", "layers", ">hidden", ">ffn", ">params", ">active", ">length", ">batch", ">lr", "about"), rows
    )
    print("M: state-space layer, *: attention layer, -: FFN, E: experts (+ a shared one).")
    print("active: parameters that a token uses, if not all; length and batch in tokens.")
    print("`txssm recipes NAME` shows one in full.")
    for folder in filter(Path.is_dir, RECIPES_OF_RUNS.folders):
        print(f"recipes: {folder}")
    print(f"batch scripts: {BATCH_SCRIPTS}")
    return 0


def show_fields() -> int:
    """Print a table of all fields of a recipe, with their Megatron arguments; returns the exit code."""
    rows = [row for name in ("", *FIELDS) for row in field_rows(name)]
    rows.append(("megatron.*", "", "any", "any other Megatron argument, by its name or flag", "that argument"))
    print_table(("field", "default", "type", "meaning", "Megatron argument"), rows)
    return 0


def field_rows(section: str) -> list[tuple[str, str, str, str, str]]:
    """Name, default, type, meaning and Megatron argument of a section's fields; "": those outside of sections."""
    rows = []
    for field in (FIELDS.get(section) or table(Recipe)).values():
        rules = field.setting
        # As one would write it in a recipe.
        default = "required" if field.required else json.dumps(field.default).strip('"')
        kind = " | ".join(field.choices) or field.type_name
        rows.append((f"{section}.{field.name}".lstrip("."), default, kind, rules.explanation, " ".join(rules.flags)))
    return rows
