"""Generates the tables of fields at the end of docs/training.md from recipe/schema.py.

python tools/document_fields.py
"""

from pathlib import Path

from megatron_txssm.recipe.catalogue import field_rows
from megatron_txssm.recipe.schema import SECTIONS

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
HEADING = "## Fields\n"
INTRODUCTION = """
The fields that concern training, as `tools/document_fields.py` takes them from `megatron_txssm/recipe/schema.py`.
`txssm recipes --fields` lists all, with their Megatron arguments.
"""


def page() -> str:
    """The whole page: what was written by hand, then the tables."""
    written, _, _ = PAGE.read_text(encoding="utf-8").partition(HEADING)
    return written + HEADING + INTRODUCTION + "".join(map(_table, ("training", "optimizer", "checkpoint", "logging")))


def _table(section: str) -> str:
    lines = [
        f"\n**{section}**: {SECTIONS[section].__doc__}\n",
        "| field | default | type | meaning |",
        "|---|---|---|---|",
    ]
    for name, default, kind, meaning, _ in field_rows(section):
        lines.append(f"| `{name}` | {default} | {kind.replace(' | ', ', ')} | {meaning.replace('|', '\\|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
