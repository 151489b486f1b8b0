"""A rank of a recipe's training on fake tensors, in a process of its own: exact memory and traffic, without GPUs."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_txssm.errors import UserError
from megatron_txssm.planning.usage import Usage
from megatron_txssm.recipe.changes import WITHOUT_REPORTS, WITHOUT_TOKENIZER, WITHOUT_TOKENS, Changes, changed
from megatron_txssm.recipe.recipe import Recipe

WORKER = "megatron_txssm.planning.dry_run.worker"
# Kernels whose memory is counted: those of a GPU with Transformer Engine, or of local modules on a CPU.
Kernels = Literal["gpu", "local"]
_WITHOUT_DATA: Changes = {
    **WITHOUT_TOKENS,
    **WITHOUT_TOKENIZER,
    **WITHOUT_REPORTS,
    "megatron.mock_data": True,
    "checkpoint.save_interval": None,
}
# PYTHONSAFEPATH: a json.py in the current folder must not be imported.
_ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
_ALONE |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


class DryRunFailed(Exception):
    """The process ended without a result; says how."""


def dry_run(recipe: Recipe, world_size: int, rank: int = 0, *, kernels: Kernels = "gpu") -> Usage:
    """What this rank of `world_size` needs; UserError if Megatron or this project refuses the recipe.

    The rank's own model, optimizer and pipeline schedule run as in a training, in about 20 seconds and one GiB.
    """
    found = run_rank(changed(recipe, _WITHOUT_DATA), world_size, rank, kernels=kernels)
    return usage_of(found["usage"])


def usage_of(found: Mapping[str, Any]) -> Usage:
    """From a worker's result."""
    return Usage(**{**found, "traffic": {(kind, group): size for kind, group, size in found["traffic"]}})


def run_rank(
    recipe: Recipe, world_size: int, rank: int, *, kernels: Kernels, only_build: bool = False
) -> dict[str, Any]:
    """The worker's result. UserError if it refuses the recipe; DryRunFailed if it ends in another way."""
    with tempfile.TemporaryDirectory(prefix="txssm-dry-run-") as name:
        folder = Path(name)
        task = write_task(recipe, folder, kernels=kernels, only_build=only_build, fake=True)
        environment = os.environ | _ALONE | {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        words = [sys.executable, "-m", WORKER, str(task)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace", check=False)
        result = folder / f"result_{rank}.json"
        if not result.exists():
            raise DryRunFailed(_last_words(done.stderr) or f"the process ended with exit code {done.returncode}")
        found = json.loads(result.read_text(encoding="utf-8"))
    if "refused" in found:
        raise UserError(found["refused"])
    return found


def write_task(recipe: Recipe, folder: Path, *, kernels: Kernels, only_build: bool, fake: bool) -> Path:
    """The worker's task file in `folder`, where each rank writes result_RANK.json."""
    file, task = folder / "recipe.yaml", folder / "task.json"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    words = {"recipe": str(file), "result": str(folder / "result_{rank}.json"), "kernels": kernels}
    task.write_text(json.dumps({**words, "only_build": only_build, "fake": fake}), encoding="utf-8")
    return task


def _last_words(stderr: str) -> str:
    """The last line of a traceback, without torch's rank prefix."""
    lines = [line.removeprefix("[rank0]:").strip() for line in stderr.splitlines()]
    said = [line for line in lines if line]
    return said[-1] if said else ""
