"""`txssm data` within the test's process, where a worker of its own would cost a second."""

from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.data.corpus.manifest import Plan, TaskManifest, read_manifest
from megatron_txssm.data.sharding import run_local
from megatron_txssm.data.sharding.shard_task import ShardTask
from megatron_txssm.recipe.corpus.schema import CorpusRecipe
from tests.data.corpus_recipes import write_byte_level_bpe, write_recipe


def run_tasks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local tasks run one after another in this process, from now on to the end of the test."""

    def run(recipe: CorpusRecipe, plan: Plan, workers: int) -> None:
        for subset in recipe.subsets:
            for task in run_local.unfinished(recipe, plan, subset):
                ShardTask(recipe, subset).run(rank=task)

    monkeypatch.setattr(run_local, "run_locally", run)


def shard(recipe: Path, *words: str) -> int:
    """The exit code of `txssm data shard`."""
    return main(["data", "shard", str(recipe), "--workers", "1", *words])


def web_recipe(folder: Path, source: Path, tokenizer: dict[str, str] | None = None, **fields: Any) -> Path:
    """A recipe of one subset, `web`, in folder/corpus."""
    return write_recipe(
        folder,
        {
            "output": str(folder / "corpus"),
            "tokenizer": write_byte_level_bpe(folder) if tokenizer is None else tokenizer,
            "subsets": {"web": {"source": str(source), "validation_fraction": 0, **fields}},
        },
    )


def manifest_of(directory: Path, task: int = 0, subset: str = "web") -> TaskManifest:
    """The manifest of a finished task."""
    manifest = read_manifest(directory, subset, task)
    assert manifest is not None, f"{subset} task {task} is not finished"
    return manifest
