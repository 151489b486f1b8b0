"""Where a recipe's values are stated, for error messages."""

from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.settings.yaml_text import key_line


@dataclass(frozen=True)
class Source:
    """A recipe's file, or a --set option."""

    name: str
    # The file's YAML.
    text: str = ""
    # The file's folder, for $RECIPE_DIR; None on the command line.
    folder: Path | None = None

    @property
    def is_command_line(self) -> bool:
        return self.folder is None

    def error(self, message: str, *keys: str) -> UserError:
        """An error about the value under `keys`, with its line."""
        line = key_line(self.text, keys) if keys and self.text else None
        return UserError(f"{self.name}{f', line {line}' if line else ''}: {message}")
