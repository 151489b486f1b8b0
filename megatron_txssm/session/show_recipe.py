"""Prints one recipe in full, or its Megatron arguments."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.corpus.tokenizer import NoCorpus
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.arguments import megatron_arguments


def show_recipe(recipe: str | Path, *, overrides: Sequence[str] = (), megatron_args: bool = False) -> int:
    """Print a recipe with all its fields, as YAML, or its Megatron command line. Returns the exit code.

    recipe: a name or a YAML file; overrides: changed fields, as "a.b=c".
    """
    loaded = load_recipe(recipe, overrides)
    if megatron_args:
        print(shlex.join(_megatron_words(loaded)))
    else:
        print(loaded.to_yaml(), end="")
    return 0


def _megatron_words(recipe: Recipe) -> list[str]:
    """Megatron's command line; if the corpus does not exist yet, without the arguments that depend on it."""
    try:
        return megatron_arguments(recipe)
    except NoCorpus as error:
        print(f"--train-data-path, --valid-data-path and the tokenizer are left out: {error}", file=sys.stderr)
    words = megatron_arguments(changed(recipe, {"data.corpus": None}))
    if recipe.data.tokenizer_type is None:
        # A recipe without a corpus would have it.
        place = words.index("--tokenizer-type")
        del words[place : place + 2]
    return words
