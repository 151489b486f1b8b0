"""Ranks of a recipe's training on fake tensors, in a process of their own: memory and traffic without GPUs or peers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_txssm.errors import UserError
from megatron_txssm.planning.usage import Usage
from megatron_txssm.recipe.changes import (
    WITHOUT_FP8,
    WITHOUT_REPORTS,
    WITHOUT_TOKENIZER,
    WITHOUT_TOKENS,
    Changes,
    changed,
)
from megatron_txssm.recipe.recipe import Recipe

WORKER = "megatron_txssm.planning.dry_run.worker"
# Kernels whose memory is counted: a GPU's with Transformer Engine, or those of local modules on a CPU.
Kernels = Literal["gpu", "local"]
# Nothing is read of a run's folder or written to it.
WITHOUT_RUN: Changes = WITHOUT_REPORTS | dict.fromkeys(
    f"checkpoint.{name}" for name in ("directory", "load_from", "branch_from", "keep_last", "keep_every")
)
MOCK_DATA: Changes = WITHOUT_TOKENS | WITHOUT_TOKENIZER | {"megatron.mock_data": True, "logging.eval_iters": 0}
# A dry run needs no data.
WITHOUT_DATA: Changes = WITHOUT_RUN | MOCK_DATA | {"checkpoint.save_interval": None}
# The emulation of FP8 in local modules keeps far more than bf16 does, Transformer Engine's FP8 as much or less.
FOR_A_STEP: Changes = WITHOUT_DATA | WITHOUT_FP8
# PYTHONSAFEPATH: a json.py in the current folder must not be imported.
_ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
_ALONE |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


class DryRunFailed(Exception):
    """A dry run raised an error, or its process ended without a result; says how."""


@dataclass(frozen=True)
class RankOf:
    """One rank of a recipe's training on `world_size` processes."""

    recipe: Recipe
    world_size: int
    rank: int = 0

    def task(self, folder: Path, kernels: Kernels, *, only_build: bool) -> dict[str, Any]:
        """The worker's task, with its recipe in `folder`."""
        file = folder / "recipe.yaml"
        # A run directory of its own: the recipe's may have a checkpoint, which Megatron would load.
        recipe = changed(self.recipe, {"run_directory": str(folder / "run")})
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        words = {"recipe": str(file), "result": str(folder / "result.json"), "kernels": kernels}
        return {**words, "world_size": self.world_size, "rank": self.rank, "only_build": only_build}


def dry_run(recipe: Recipe, world_size: int, rank: int = 0, *, kernels: Kernels = "gpu") -> Usage:
    """What this rank of `world_size` needs.

    UserError if Megatron or this project refuses the recipe, DryRunFailed if it does not train. The rank's own model,
    optimizer and pipeline schedule run as in a training, in about 20 seconds and one GiB.
    """
    [found] = run_ranks([RankOf(changed(recipe, FOR_A_STEP), world_size, rank)], kernels=kernels)
    if "failed" in found:
        raise DryRunFailed(found["failed"])
    return usage_of(found["usage"])


def usage_of(found: Mapping[str, Any]) -> Usage:
    """From a worker's result."""
    return Usage(**{**found, "traffic": {(kind, group): size for kind, group, size in found["traffic"]}})


def run_ranks(ranks: Sequence[RankOf], *, kernels: Kernels, only_build: bool = False) -> list[dict[str, Any]]:
    """The worker's results, of ranks one after another in one process.

    UserError if it refuses a recipe; DryRunFailed if it ends without a result, or no file can be written.
    """
    try:
        return _run(ranks, kernels, only_build)
    except OSError as error:
        raise DryRunFailed(str(error)) from error


def _run(ranks: Sequence[RankOf], kernels: Kernels, only_build: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="txssm-dry-run-") as name:
        folders = [Path(name) / str(number) for number, _ in enumerate(ranks)]
        tasks: list[dict[str, Any]] = []
        for folder, rank in zip(folders, ranks, strict=True):
            folder.mkdir()
            tasks.append(rank.task(folder, kernels, only_build=only_build))
        file = Path(name) / "tasks.json"
        file.write_text(json.dumps(tasks), encoding="utf-8")
        words = [sys.executable, "-m", WORKER, str(file)]
        done = subprocess.run(words, env=os.environ | _ALONE, capture_output=True, text=True, errors="replace")
        return [_result(Path(task["result"]), done) for task in tasks]


def _result(file: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if not file.exists():
        raise DryRunFailed(_ending(done))
    found = json.loads(file.read_text(encoding="utf-8"))
    if "refused" in found:
        raise UserError(found["refused"])
    return found


def _ending(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        # What it printed before says nothing about that.
        name = signal.Signals(-done.returncode).name
        return f"{name} ended its process" + ("; is memory short?" if name in ("SIGKILL", "SIGBUS") else "")
    return _last_words(done.stderr) or f"its process ended with exit code {done.returncode}"


def _last_words(stderr: str) -> str:
    """The last line of a traceback, without the rank that torch puts before it."""
    said = [line.partition("]:")[2] if line.startswith("[rank") else line for line in stderr.splitlines()]
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1] if lines else ""
