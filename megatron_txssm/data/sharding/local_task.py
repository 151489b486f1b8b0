"""Runs a task under datatrove's local executor."""

import contextlib
import io

from datatrove.executor.local import LocalPipelineExecutor

from megatron_txssm.data.corpus.manifest import logging_folder, read_plan
from megatron_txssm.data.sharding.shard_task import ShardTask
from megatron_txssm.recipe.corpus.schema import CorpusRecipe


class LocalTask(LocalPipelineExecutor):
    """Runs one task at a time in the calling process."""

    def __init__(self, recipe: CorpusRecipe, subset: str) -> None:
        super().__init__(
            [ShardTask(recipe, subset)],
            tasks=len(read_plan(recipe.path).tasks[subset]),
            logging_dir=str(logging_folder(recipe.path, subset)),
        )

    def run_task(self, task: int) -> None:
        # datatrove's messages are in its log files, too; the terminal shows the progress.
        with contextlib.redirect_stderr(io.StringIO()):
            self._run_for_rank(task)
