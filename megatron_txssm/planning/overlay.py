"""A plan as a recipe that extends the planned one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError
from megatron_txssm.files import check_absent, write_file_atomically
from megatron_txssm.planning.layouts import Layout
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import find_recipe, load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.settings.yaml_text import dump_yaml
from megatron_txssm.recipe.validation.validate import validate


def check_overlay(out: Path, recipe: Recipe) -> None:
    """UserError if no recipe that extends `recipe` can be written there."""
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out} must end in .yaml, as recipes do")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise UserError(f"--out {out}: its folder does not exist; make it, or name another")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out {out}: its folder cannot be written; name another")
    check_absent(out)
    validate(changed(recipe, {"name": out.stem}))


def write_overlay(out: Path, extends: str, recipe: Recipe, layout: Layout, stated: Sequence[str], about: str) -> None:
    """Write the layout to `out` as a recipe that extends `extends`, and load and check it.

    recipe: the planned recipe, with the dotted fields `stated` that --set changed, which the overlay repeats.
    about:  the overlay's description.
    """
    fields = {name: _value(recipe, name) for name in stated} | layout.changes
    sections: dict[str, Any] = {}
    for dotted, value in fields.items():
        section, dot, name = dotted.partition(".")
        if dot:
            sections.setdefault(section, {})[name] = value
        else:
            sections[section] = value
    text = dump_yaml({"extends": _extended(extends, out), "description": about, **sections})
    check_absent(out)
    try:
        write_file_atomically(out, text.encode())
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; name another, or make room") from None
    validate(load_recipe(out), layout.gpus)


def _value(recipe: Recipe, dotted: str) -> Any:
    section, dot, name = dotted.partition(".")
    if section == "megatron":
        return recipe.megatron.get(name)
    return getattr(getattr(recipe, section), name) if dot else getattr(recipe, section)


def _extended(recipe: str, out: Path) -> str:
    """How the overlay names the recipe: by name, or by its path from the overlay's folder."""
    if not recipe.endswith((".yaml", ".yml")) and "/" not in recipe:
        return recipe
    return os.path.relpath(find_recipe(recipe).absolute(), out.absolute().parent)
