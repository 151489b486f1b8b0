"""`txssm plan --calibrate`: how a step of this machine differs from the formulas, measured in one layout."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_txssm.architecture.gpus import Gpu, gpu_of
from megatron_txssm.errors import UserError
from megatron_txssm.planning.corrections import Calibration, Corrections, Line, Link
from megatron_txssm.planning.dry_run.run import WITHOUT_DATA
from megatron_txssm.planning.kernels import HEAD, head_seconds, layer_seconds
from megatron_txssm.planning.layouts import layout_of
from megatron_txssm.planning.ranking import Estimates
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.planning.share import share_of
from megatron_txssm.recipe.changes import ONE_MODEL_PARALLEL_RANK, Changes, changed, without_prediction
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.terminal import doing, print_table

WORKER = "megatron_txssm.planning.calibration.worker"
# Of each training, after the worker's WARM_UP.
STEPS = 5
MICRO_BATCHES = 2
# Data parallelism alone, without a CUDA graph, which has no hooks.
ONE_LAYOUT: Changes = {
    **WITHOUT_DATA,
    **ONE_MODEL_PARALLEL_RANK,
    "parallel.recompute": "none",
    "megatron.cuda_graph_impl": None,
    "training.train_tokens": None,
    "training.train_iters": 1000,
}


def calibrate(recipe: Recipe, processes: int) -> Calibration:
    """Train a few steps of the recipe on `processes` of this machine: what differs from the formulas.

    Prints measured and predicted seconds. UserError if the recipe cannot train here.
    """
    _check_machine(processes)
    recipes = [in_one_layout(recipe, processes, samples=count * recipe.training.micro_batch_size) for count in (1, 2)]
    print(
        f"{recipe.name}: {STEPS} steps of {MICRO_BATCHES} micro-batches, of two sizes, on {processes} processes",
        flush=True,
    )
    with doing("training and measuring"):
        found = timed_trainings(recipes, processes, parts=True)
    gpu = _gpu(found[0], processes)
    corrections = _corrections(recipes, Cluster(gpu, processes), found)
    layout = layout_of(recipes[0], processes)
    measured = f"{layout.name} of {recipe.name} on {processes} {gpu.name}: {_median(found[0]['steps']):.3f} s a step"
    return Calibration(gpu, measured, corrections)


def _check_machine(processes: int) -> None:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here, kind = (gpus, "GPUs") if gpus else (len(os.sched_getaffinity(0)), "cores and no GPU")
    if processes > here:
        raise UserError(f"--gpus {processes}: this machine has {here} {kind}; measure at most as many")


def in_one_layout(recipe: Recipe, processes: int, samples: int) -> Recipe:
    """The recipe for a few steps of `processes` data-parallel ranks, with so many samples a micro-batch."""
    recipe = changed(without_prediction(recipe), ONE_LAYOUT)
    tokens = processes * MICRO_BATCHES * samples * recipe.training.seq_length
    return changed(recipe, {"training.micro_batch_size": samples, "training.global_batch_tokens": tokens})


def timed_trainings(recipes: Sequence[Recipe], processes: int, *, parts: bool = False) -> list[dict[str, Any]]:
    """worker.py's results of each recipe, trained one after another on the same processes.

    UserError if Megatron or this project refuses one, or one does not train here.
    """
    with tempfile.TemporaryDirectory(prefix="txssm-calibrate-") as name:
        tasks: list[dict[str, Any]] = []
        for number, recipe in enumerate(recipes):
            folder = Path(name) / str(number)
            folder.mkdir()
            # A run directory of its own: the recipe's may have a checkpoint, which Megatron would load.
            recipe = changed(recipe, {"run_directory": str(folder / "run")})
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
            files = {"recipe": str(folder / "recipe.yaml"), "result": str(folder / "result.json")}
            tasks.append({**files, "steps": STEPS, "parts": parts})
        file = Path(name) / "tasks.json"
        file.write_text(json.dumps(tasks), encoding="utf-8")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        # PYTHONSAFEPATH: a json.py in the current folder must not be imported.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "TMPDIR": name}
        done = subprocess.run(
            [*launch, "-m", WORKER, str(file)], env=environment, capture_output=True, text=True, errors="replace"
        )
        return [_result(Path(task["result"]), done) for task in tasks]


def _result(file: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if not file.exists():
        raise UserError(f"the recipe does not train here (exit code {done.returncode}):\n{done.stderr[-2000:]}")
    found = json.loads(file.read_text(encoding="utf-8"))
    if "refused" in found:
        raise UserError(found["refused"])
    if "failed" in found:
        raise UserError(f"the recipe does not train here: {found['failed']}")
    return found


def _median(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def _gpu(found: Mapping[str, Any], processes: int) -> Gpu:
    """The device; a CPU's core counts as a GPU with the rates that it reached."""
    if found["device"] != "cpu":
        gpu = gpu_of(found["device"])
        if gpu is None:
            raise UserError(f"{found['device']} is not in architecture/gpus.py; add its data sheet's figures")
        return gpu
    import psutil

    link = max((link["bandwidth"] for link in found["links"].values()), default=found["bandwidth"])
    memory = psutil.virtual_memory().total // processes
    flops, bandwidth = found["flops"], found["bandwidth"]
    return Gpu("cpu", "CPU", (0, 0), flops, None, memory, bandwidth, link, link, per_node=processes)


def _corrections(recipes: Sequence[Recipe], cluster: Cluster, results: Sequence[Mapping[str, Any]]) -> Corrections:
    """What follows from a training with small and one with large micro-batches; prints measured and predicted seconds.

    Whatever is not a layer's is that of the small ones.
    """
    passes: dict[str, tuple[Line, Line]] = {}
    rows: list[tuple[str, ...]] = []
    predicted = [_predicted(recipe, cluster, results[0]["parts"]) for recipe in recipes]
    for part in results[0]["parts"]:
        lines: list[Line] = []
        for number, name in enumerate(("forward", "backward")):
            measured = [result["parts"][part][number] for result in results]
            formula = [seconds[part][number] for seconds in predicted]
            lines.append(line_through(formula, measured))
            rows.append(_row(f"{part} {name}", measured[0], formula[0], lines[-1]))
        passes[part] = (lines[0], lines[1])
    recipe, found = recipes[0], results[0]
    layout = layout_of(recipe, cluster.per_node)
    links = {name: Link(**link) for name, link in found["links"].items()}
    kernels = Corrections(passes=passes, links=links, alone=found.get("alone", 1.0))
    estimates = Estimates(recipe, dataclasses.replace(cluster, corrections=kernels))
    time = estimates.plan(layout).time
    optimizer = Line(found["optimizer"] / time.optimizer)
    rows.append(_row("optimizer", found["optimizer"], time.optimizer, optimizer))
    # The last backward pass hides some of data parallelism.
    rest = max(0.0, _median(found["steps"]) - found["passes"] - found["optimizer"] - time.data)
    for name, seconds in (("a micro-batch beside these", found["outside"]), ("rest of a step", rest)):
        rows.append((name, f"{1000 * seconds:.2f}", "", "", ""))
    if kernels.alone > 1:
        rows.append(("all, while other processes wait", "", "", f"{1 / kernels.alone:.2f}", ""))
    print_table(("part", ">ms measured", ">by formula", ">factor", ">ms fixed"), rows)
    return dataclasses.replace(kernels, optimizer=optimizer.factor, micro_batch=found["outside"], step=rest)


def _predicted(recipe: Recipe, cluster: Cluster, parts: Iterable[str]) -> dict[str, tuple[float, float]]:
    """By formula: seconds of each part forward and backward."""
    share = share_of(recipe, layout_of(recipe, cluster.per_node))
    return {
        part: head_seconds(share, cluster) if part == HEAD else layer_seconds(share, cluster, part) for part in parts
    }


def line_through(predicted: Sequence[float], measured: Sequence[float]) -> Line:
    """The line through two points; through the first and the origin if it would fall, or begin below zero."""
    factor = (measured[1] - measured[0]) / (predicted[1] - predicted[0])
    fixed = measured[0] - factor * predicted[0]
    return Line(factor, fixed) if factor > 0 and fixed >= 0 else Line(measured[0] / predicted[0])


def _row(name: str, measured: float, predicted: float, line: Line) -> tuple[str, ...]:
    return (
        name,
        *(f"{1000 * seconds:.2f}" for seconds in (measured, predicted)),
        f"{line.factor:.2f}",
        f"{1000 * line.fixed:.2f}",
    )
