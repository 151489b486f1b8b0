"""The program of a job array's task: runs the pipeline that datatrove pickled when the array was submitted.

    python -m megatron_txssm.data.sharding.array_task PICKLE

A queued array may have been submitted by an earlier version, in which modules had other names.
"""

import importlib
import runpy
import sys

# Module names before version 0.2; kept for one release.
_BEFORE = {
    "megatron_txssm.data.corpus_recipe": "megatron_txssm.recipe.corpus.schema",
    "megatron_txssm.recipe.corpus_recipe": "megatron_txssm.recipe.corpus.schema",
    "megatron_txssm.data.manifest": "megatron_txssm.data.corpus.manifest",
    "megatron_txssm.data.shard_task": "megatron_txssm.data.sharding.shard_task",
    "megatron_txssm.data.slurm_array": "megatron_txssm.data.sharding.slurm_array",
}


def know_earlier_names() -> None:
    """Let pickles refer to modules by their earlier names."""
    for old, new in _BEFORE.items():
        sys.modules[old] = importlib.import_module(new)


if __name__ == "__main__":
    know_earlier_names()
    runpy.run_module("datatrove.tools.launch_pickled_pipeline", run_name="__main__", alter_sys=True)
