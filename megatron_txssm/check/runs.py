"""Runs of the training loop in processes on this machine, for comparison: each writes its losses and gradients."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_txssm.process_tree import signal_descendants
from megatron_txssm.recipe.recipe import Recipe

# The module that each rank runs.
WORKER = "megatron_txssm.check.worker"
# After a recipe's own arguments. With a short timeout, a collective that one rank does not enter fails soon.
_ARGUMENTS = ("--num-workers", "0", "--distributed-timeout-minutes", "3")


@dataclass(frozen=True)
class Run(ABC):
    """One run, and the folder of its files."""

    out: Path

    @abstractmethod
    def task(self) -> dict[str, Any]:
        """The worker's task, without `out`: a recipe's file or none, and Megatron arguments after it."""

    @property
    def result(self) -> Path:
        """The file whose existence marks the run as complete."""
        return self.out / "losses.json"

    def losses(self) -> dict[int, float]:
        """The loss of each step, in nats per token."""
        return {int(step): loss for step, loss in json.loads(self.result.read_text()).items()}

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Whole gradients by the parameter's name in the checkpoint; elements that no rank holds are NaN."""
        whole: dict[str, Tensor] = {}
        for file in self.out.glob(f"gradients_{step}_*.pt"):
            for key, shape, offset, piece in torch.load(file, weights_only=True):
                where = tuple(slice(start, start + size) for start, size in zip(offset, piece.shape, strict=True))
                whole.setdefault(key, torch.full(shape, torch.nan, dtype=piece.dtype))[where] = piece
        return whole

    def refusal(self) -> str | None:
        """The message of a UserError, such as Megatron's about invalid arguments."""
        file = self.out / "refused"
        return file.read_text(encoding="utf-8") if file.exists() else None

    def failure(self) -> str | None:
        """What ended the run, in one sentence; None if it did not fail."""
        file = self.out / "failure"
        return file.read_text(encoding="utf-8") if file.exists() else self.refusal()

    def is_done(self) -> bool:
        return self.result.exists() or self.failure() is not None


@dataclass(frozen=True)
class RecipeRun(Run):
    """One run of a recipe."""

    recipe: Recipe

    def task(self) -> dict[str, Any]:
        file = self.out / "recipe.yaml"
        file.write_text(self.recipe.to_yaml(), encoding="utf-8")
        return {"recipe": str(file), "arguments": _ARGUMENTS}


@dataclass(frozen=True)
class LeakageRun(RecipeRun):
    """One layout of `txssm check leakage`: random packings from a seed, without training."""

    packings: int
    seed: int

    def task(self) -> dict[str, Any]:
        return super().task() | {"packings": self.packings, "seed": self.seed}

    @property
    def result(self) -> Path:
        return self.out / "leaks.json"


def run_all(
    world_size: int, runs: Sequence[Run], *, precision: str = "fp32", advance: Callable[[int], object] | None = None
) -> None:
    """Do `runs` one after another on `world_size` gloo processes; `advance(1)` is called as each ends.

    precision: fp32 or fp64, the type that a recipe's fp32 is computed in (see double.py).

    A run that fails ends its processes: its `failure()` is set, and later runs continue in new processes.
    """
    waiting = list(runs)
    while waiting:
        _launch(world_size, waiting, precision, advance or (lambda _: None))
        waiting = [run for run in waiting if not run.is_done()]


def _launch(world_size: int, runs: list[Run], precision: str, advance: Callable[[int], object]) -> None:
    """Start the processes, and wait until all of `runs` are done or one has failed."""
    for run in runs:
        run.out.mkdir(parents=True, exist_ok=True)
    tasks = [{"out": str(run.out), "recipe": None, **run.task()} for run in runs]
    tasks_file = runs[0].out / "tasks.json"
    tasks_file.write_text(json.dumps(tasks), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    # PYTHONSAFEPATH: a json.py in the current folder must not be imported.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    # The launcher leaves temporary folders behind.
    environment["TMPDIR"] = str(runs[0].out)
    handle, log = tempfile.mkstemp(prefix="txssm-check-", suffix=".log")
    with open(handle, "wb") as stream:
        process = subprocess.Popen(
            [*command, "-m", WORKER, str(tasks_file), precision],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C only reaches this process, which ends the others.
            start_new_session=True,
        )
    failed = False
    try:
        for run in runs:
            while not run.is_done():
                # In this order: the run may complete just before the process ends.
                ended = process.poll() is not None
                if ended and not run.is_done():
                    _note_failure(run, process.returncode, log)
                    failed = True
                time.sleep(0.05)
            advance(1)
            if failed:
                return
        # All results are written; on a busy machine the processes take a while to exit.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
    finally:
        _kill(process)
        if not failed:
            Path(log).unlink(missing_ok=True)


def _note_failure(run: Run, code: int, log: str) -> None:
    """Write one sentence into the run's folder: the message of the first rank that failed."""
    said = sorted(run.out.glob("failed_*"), key=lambda file: file.stat().st_mtime_ns)
    if said:
        rank = said[0].name.partition("_")[2]
        text = said[0].read_text(encoding="utf-8", errors="replace").strip().partition("\n")[0]
        sentence = f"rank {rank} failed: {text}"
    else:
        sentence = f"the processes ended with exit code {code}, without a message"
    (run.out / "failure").write_text(f"{sentence} (log: {log})", encoding="utf-8")


def _kill(process: subprocess.Popen) -> None:
    """Kill the launcher and its workers, if they are still running."""
    if process.poll() is None:
        signal_descendants(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def worst_gradient(run: Run, reference: Run, steps: Sequence[int]) -> tuple[float, str]:
    """The largest ‖g − g_ref‖ / ‖g_ref‖ of a parameter, and its name; the norms are over all steps.

    Not per step: the gradient of a vector with one number per head is a sum that may almost cancel in one step, and
    then shows the rounding of its terms. Infinite if a gradient is missing, in part or entirely, or is zero in the
    reference, where the comparison is meaningless.
    """
    ours = [run.gradients(step) for step in steps]
    theirs = [reference.gradients(step) for step in steps]
    keys = {key for gradients in ours + theirs for key in gradients}
    return max((_gradient_error(key, ours, theirs), key) for key in sorted(keys))


def _gradient_error(key: str, ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> float:
    if not all(key in gradients for gradients in ours + theirs):
        return float("inf")
    expected = torch.stack([gradients[key] for gradients in theirs])
    error = float((torch.stack([gradients[key] for gradients in ours]) - expected).norm() / expected.norm())
    return float("inf") if error != error else error
