"""A kind of recipe: its tables of fields, and where its files are."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError, nearest, shown
from megatron_txssm.home import RECIPES
from megatron_txssm.recipe.settings.setting import Field
from megatron_txssm.recipe.settings.source import Source
from megatron_txssm.recipe.settings.yaml_text import load_yaml

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The recipes of a run, or those of a corpus."""

    noun: str
    # Below recipes/, of the current directory and of this repository.
    folder: str = ""
    # Section -> name -> field; "" has the fields outside of sections.
    fields: dict[str, dict[str, Field]]
    # Sections of which a recipe has any number, each under a name.
    named: tuple[str, ...] = ()
    # Sections without a table: what converts one entry, (name, value, source) -> (name, value).
    open: dict[str, Callable[[str, Any, Source], tuple[str, Any]]] = field(default_factory=dict)
    # Fields outside of sections that a recipe does not inherit from the one it extends.
    own: tuple[str, ...]
    # How --set is written.
    usage: str
    # The command that lists the recipes; without one, a message lists them.
    listed_by: str | None = None
    # A file of an earlier version in today's terms.
    translated: Callable[[dict[str, Any]], dict[str, Any]] = lambda data: data
    # What to write instead of a dotted field that there was, given its section's entries; empty for any other.
    replacement: Callable[[str, dict[str, Any]], str] = lambda dotted, entries: ""

    @property
    def sections(self) -> list[str]:
        return [*filter(None, self.fields), *self.open]

    @property
    def folders(self) -> list[Path]:
        """The folders in which a recipe is looked up by its name, in that order."""
        return list(dict.fromkeys((folder / self.folder).resolve() for folder in (Path("recipes"), RECIPES)))

    @property
    def files(self) -> dict[str, Path]:
        """The recipes in these folders, by name."""
        found = [path for folder in self.folders for path in sorted(folder.glob("*.yaml"))]
        return {path.stem: path for path in reversed(found)}

    def names(self) -> list[str]:
        """The recipes that can be used by name; the abstract ones can only be extended."""
        return sorted(name for name, path in self.files.items() if not self.read(path)[0].get("abstract"))

    def find(self, name_or_path: str | Path) -> Path:
        """The file of a recipe; UserError names the nearest known one."""
        text = os.path.expanduser(name_or_path)
        if text.endswith(SUFFIXES) or "/" in text:
            return Path(text)
        files = self.files
        if text in files:
            return files[text]
        listed = f"{self.listed_by} lists them" if self.listed_by else f"there are {', '.join(sorted(files))}"
        raise UserError(
            f"no {self.noun} is named {shown(text)}{nearest(text, files)}; {listed}, and a path ends in .yaml"
        )

    def read(self, path: Path) -> tuple[dict[str, Any], Source]:
        """What a file states."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{path}: no such {self.noun} file{near_file(path)}") from None
        except IsADirectoryError:
            inside = [str(file) for file in sorted(path.glob("*.y*ml"))]
            hint = f"name a file in it: {', '.join(inside[:5])}" if inside else f"a {self.noun} is a YAML file"
            raise UserError(f"{path}: cannot be read as a {self.noun}: it is a folder; {hint}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as a {self.noun}: {error}") from None
        data = load_yaml(text, str(path))
        if not isinstance(data, dict):
            raise UserError(f"{path}: a {self.noun} is a mapping of {', '.join(self.sections)}, not {shown(data)}")
        return self.translated(data), Source(str(path), text, path.parent.absolute())


def near_file(path: Path) -> str:
    """A hint: the file in the same folder that may be meant."""
    return nearest(str(path), map(str, path.parent.glob("*.y*ml")))
