"""docs/training.md: its tables are the schema's, its recipes load."""

import re
import runpy
from pathlib import Path

import pytest

from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from megatron_txssm.recipe.loader import load_recipe

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The page's YAML blocks whose first line names their file."""
    found = {}
    for name, rest, text in re.findall(r"```yaml\n# (\w+\.yaml)(.*?)\n(.*?)```", PAGE, re.DOTALL):
        found[name] = tmp_path / name
        found[name].write_text(f"#{rest}\n{text}")
    return found


def test_the_tables_are_made_from_the_schema() -> None:
    """python tools/document_fields.py"""
    assert runpy.run_path(str(REPOSITORY / "tools" / "document_fields.py"))["page"]() == PAGE


def test_its_recipes_load(files: dict[str, Path]) -> None:
    assert set(files) == {"mine.yaml", "corpus.yaml", "branch.yaml", "longer.yaml"}
    load_corpus_recipe(str(files["corpus.yaml"]))
    # There is no corpus that would know it.
    recipes = {name: load_recipe(files[name], ["data.vocab_size=32000"]) for name in files if name != "corpus.yaml"}
    assert recipes["branch.yaml"].wsd_decay_iters == 1000
    assert recipes["longer.yaml"].checkpoint_path == Path("runs/mine_16k/checkpoints")
