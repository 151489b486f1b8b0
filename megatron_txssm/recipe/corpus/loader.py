"""From a corpus recipe's name or path to a checked `CorpusRecipe`; settings/layers.py reads its layers."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.errors import UserError, nearest
from megatron_txssm.recipe.corpus.checks import check_corpus_recipe
from megatron_txssm.recipe.corpus.schema import KEPT_RECIPE, SECTIONS, CorpusRecipe, SubsetSource
from megatron_txssm.recipe.settings.kind import SUFFIXES, Kind
from megatron_txssm.recipe.settings.layers import complete, file_layers, merged, override
from megatron_txssm.recipe.settings.setting import table

CORPUS_RECIPES = Kind(
    noun="corpus recipe",
    folder="corpora",
    fields={
        "": table(CorpusRecipe),
        "tokenizer": table(SECTIONS["tokenizer"]),
        "subsets": table(SubsetSource),
        "slurm": table(SECTIONS["slurm"]),
    },
    named=("subsets",),
    # They identify the corpus; two recipes with one output would overwrite each other.
    own=("name", "description", "output"),
    usage="output=PATH, section.field=value or subsets.NAME.field=value",
)


def load_corpus_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> CorpusRecipe:
    """The checked recipe from a file, or from a name in recipes/corpora/; overrides: "subsets.web.limit=100"."""
    path = find_corpus_recipe(name_or_path)
    if os.path.isdir(path) or (not os.path.exists(path) and path.suffix not in SUFFIXES):
        raise UserError(f"{path} holds no corpus (no {KEPT_RECIPE}); {how_to_make(path)}")
    layers = file_layers(CORPUS_RECIPES, path)
    if path.name == KEPT_RECIPE and (path.parent / "plan.json").exists():
        # The corpus may have been moved.
        layers.append({"": {"output": str(path.parent)}})
    stated = merged([*layers, *(override(CORPUS_RECIPES, text) for text in overrides)])
    tables = CORPUS_RECIPES.fields
    top = complete(tables[""], {"name": path.stem, **stated.get("", {})}, "", path)
    sections = {
        name: section(**complete(tables[name], stated.get(name, {}), name, path)) for name, section in SECTIONS.items()
    }
    subsets = {
        section.removeprefix("subsets."): SubsetSource(**complete(tables["subsets"], values, section, path))
        for section, values in stated.items()
        if section.startswith("subsets.")
    }
    if not subsets:
        raise UserError(f"{path}: subsets is missing; name one or more, each a section with a source")
    recipe = CorpusRecipe(**top, **sections, subsets=subsets)
    try:
        check_corpus_recipe(recipe)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return recipe


def find_corpus_recipe(name_or_path: str | Path) -> Path:
    """The file of a corpus recipe, of a corpus directory, or of a name in recipes/corpora/."""
    # Path.is_file would raise for an overlong name.
    if os.path.isfile(Path(name_or_path) / KEPT_RECIPE):
        return Path(name_or_path) / KEPT_RECIPE
    return CORPUS_RECIPES.find(name_or_path)


def how_to_make(directory: str | Path) -> str:
    """A remedy for a directory without a corpus: a neighbouring corpus, or the command that makes one."""
    directory = Path(directory)
    if hint := nearest(directory.name, [path.parent.name for path in directory.parent.glob("*/plan.json")]):
        return hint.removeprefix("; ")
    # python_library reads files that the demo writes first.
    commands = {name: f"txssm data shard {name}" for name in CORPUS_RECIPES.files} | {"python_library": "txssm demo"}
    for name, command in commands.items():
        # Skip broken recipes: they are unrelated to the error being reported.
        with contextlib.suppress(UserError):
            if load_corpus_recipe(name).path.resolve() == directory.resolve():
                return f"make it: {command}"
    return "`txssm data shard RECIPE` makes one from a corpus recipe (docs/data.md)"
