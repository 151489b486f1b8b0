"""Paths in recipes: as written by users, and as stored in a run's own recipe.

A path may begin with `~` and contain `$NAME` or `${NAME}`, as in a shell; `$$` is a dollar sign. `$RECIPE_DIR` is the
folder of the recipe's file. A relative path starts at the current folder. A run's recipe.yaml is independent of the
current folder: paths inside the run start at $RECIPE_DIR, so that the folder can be moved; the others are absolute.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A dollar without a name is left alone: $(…), a dollar at the end.
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
RECIPE_DIR = "RECIPE_DIR"


def expanded(path: str, recipe_dir: Path | None) -> str:
    """Expand `~` and variables; ValueError if one is not set. `recipe_dir` is None on a command line."""

    def value(match: re.Match[str]) -> str:
        name = match[2] or match[3]
        if name is None:
            return "$"
        found = str(recipe_dir) if name == RECIPE_DIR and recipe_dir else os.environ.get(name)
        if not found:
            raise ValueError(f"contains ${name}, which is not set; set it, or write $$ for a dollar sign")
        return found

    # Dollars in the home folder's name are not expanded.
    user, slash, rest = path.partition("/") if path.startswith("~") else ("", "", path)
    home = os.path.expanduser(user)
    if home.startswith("~"):
        raise ValueError(f"begins with {home}, whose home folder is not known; write it out, or ./{path}")
    return home + slash + _VARIABLE.sub(value, rest)


def escaped(path: str) -> str:
    """Inverse of `expanded`: escapes a literal path."""
    path = path.replace("$", "$$")
    return f"./{path}" if path.startswith("~") else path


def frozen(path: str, folder: Path, run: Path) -> str:
    """A path for the recipe.yaml in `folder`, which may be inside the run folder `run`; both absolute."""
    place = Path(os.path.abspath(path))
    inside = place.is_relative_to(folder) or (place.is_relative_to(run) and folder.is_relative_to(run))
    if not inside:
        return escaped(str(place))
    relative = os.path.relpath(place, folder)
    return f"${RECIPE_DIR}" if relative == "." else f"${RECIPE_DIR}/{escaped(relative)}"


def each_path(value: Any, change: Callable[[str], str]) -> Any:
    """A field's value with every path in it changed: a path, a blend of (weight, prefix), words of which YAML files are
    paths, or None.
    """
    if isinstance(value, str):
        return change(value) if value else value
    if isinstance(value, tuple):
        return tuple(_each_path_of_entry(entry, change) for entry in value)
    return value


def is_task_file(word: str) -> bool:
    """Whether a word of `evaluation.tasks` is a file, not a name."""
    return word.endswith((".yaml", ".yml"))


def _each_path_of_entry(entry: str | tuple[float, str], change: Callable[[str], str]) -> str | tuple[float, str]:
    if isinstance(entry, str):
        return change(entry) if is_task_file(entry) else entry
    weight, prefix = entry
    return weight, change(prefix)
