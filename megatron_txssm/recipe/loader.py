"""From a recipe's name or path to a checked `Recipe`; settings/layers.py reads its layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError, nearest, shown
from megatron_txssm.recipe.former import check_overrides, replacement, translated
from megatron_txssm.recipe.megatron_arguments.section import entry, known_names, passing
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import ALTERNATIVES, FIELDS, SECTIONS
from megatron_txssm.recipe.settings.kind import Kind
from megatron_txssm.recipe.settings.layers import complete, file_layers, merged, override
from megatron_txssm.recipe.settings.paths import each_path, expanded
from megatron_txssm.recipe.settings.setting import table
from megatron_txssm.recipe.settings.source import Source
from megatron_txssm.recipe.validation.validate import validate


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The checked recipe from a file or a name in recipes/, with `overrides` such as "training.train_iters=20"."""
    path = find_recipe(name_or_path)
    files = file_layers(RECIPES_OF_RUNS, path)
    check_overrides(overrides, merged(files).get("model", {}).get("layer_pattern"))
    stated = merged(files + [override(RECIPES_OF_RUNS, text) for text in overrides], ALTERNATIVES)
    top, data = stated.get("", {}), stated.get("data", {})
    if data.get("vocab_size") is None and data.get("corpus") is not None:
        data["vocab_size"] = _corpus_vocab_size(data["corpus"], path)
    sections = {
        name: section(**complete(FIELDS[name], stated.get(name, {}), name, path)) for name, section in SECTIONS.items()
    }
    recipe = Recipe(**{"name": path.stem, **top}, **sections, megatron=stated.get("megatron", {}))
    validate(recipe, source=path)
    return recipe


def recipe_names() -> list[str]:
    """The recipes that can be run by name: those of the current directory's recipes/ and of this repository's."""
    return RECIPES_OF_RUNS.names()


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe; UserError names the nearest known recipe."""
    return RECIPES_OF_RUNS.find(name_or_path)


def _corpus_vocab_size(corpus: str, path: Path) -> int:
    from megatron_txssm.recipe.corpus.tokenizer import read_tokenizer_facts

    try:
        return read_tokenizer_facts(Path(corpus)).vocab_size
    except UserError as error:
        raise UserError(
            f"{path}: data.vocab_size is not stated, and data.corpus={corpus} does not provide it ({error}); "
            "state it to use the recipe before the corpus is made"
        ) from None


def _megatron_entry(name: str, value: Any, source: Source) -> tuple[str, Any]:
    """An entry of the `megatron:` section, by its name in Megatron's namespace."""
    keys = ("megatron", name)
    dotted = f"megatron.{name}"
    scalar = str | int | float | bool | None
    # The rest is checked as Megatron's parser would.
    if not isinstance(value, scalar) and not (isinstance(value, list) and all(isinstance(v, scalar) for v in value)):
        raise source.error(f"{dotted}={shown(value)} must be one value or a list of values", *keys)
    try:
        known, converted = entry(name, value)
        is_path = passing()[known].kind == "path"
        return known, each_path(converted, lambda path: expanded(path, source.folder)) if is_path else converted
    except KeyError as unknown:
        hint = nearest(unknown.args[0], known_names())
        raise source.error(f"{dotted}: Megatron has no such argument{hint}", *keys) from None
    except ValueError as error:
        raise source.error(f"{dotted}={shown(value)}{error}", *keys) from None


RECIPES_OF_RUNS = Kind(
    noun="recipe",
    fields={"": table(Recipe), **FIELDS},
    open={"megatron": _megatron_entry},
    # They identify the recipe.
    own=("name", "description"),
    usage="section.field=value, such as training.train_iters=20",
    listed_by="`txssm recipes`",
    translated=translated,
    replacement=replacement,
)
