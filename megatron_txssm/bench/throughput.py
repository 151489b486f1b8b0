"""`txssm bench throughput`: training and inference of models of one size over sequence lengths (figure 4)."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.bench.models import (
    DECODING,
    ENTRANTS,
    PREFILL,
    PRESETS,
    TRAINING,
    cache_bytes,
    model_flops,
    recipe_of,
    score_bytes,
)
from megatron_txssm.bench.plan import Plan, Unit
from megatron_txssm.bench.results import Figures, Key, Results
from megatron_txssm.bench.summary import rate, show, speed
from megatron_txssm.check.gpu.children import Child
from megatron_txssm.check.gpu.speed import AS_A_GRAPH
from megatron_txssm.check.gpu.trainings import LOCAL, surroundings_of, tokens_for
from megatron_txssm.errors import UserError
from megatron_txssm.files import alone_in, unwound_by_signals
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.terminal import doing, progress_bar

Device = Literal["cuda", "cpu"]
WORKER = "megatron_txssm.bench.worker"
# Steps before those that count: on a GPU they compile, tune block sizes, and record a graph.
WARM_UP: dict[Device, int] = {"cpu": 1, "cuda": 5}
ON_CPU: Changes = LOCAL | {"training.precision": "fp32"}
# Of the kind that a step has beside the scores themselves: their softmax and its gradient.
COPIES_OF_SCORES = 3


class Bench:
    """The machine, and the settings of every measurement on it."""

    def __init__(self, plan: Plan, folder: Path, *, cuda_graph: bool = False):
        import torch

        self.plan, self.sizes, self.folder = plan, PRESETS[plan.preset], folder
        self.device: Device = "cuda" if torch.cuda.is_available() else "cpu"
        if cuda_graph and self.device == "cpu":
            raise UserError("--cuda-graph needs a GPU, and none is visible here; leave it out")
        self.cuda_graph, self.transformer_engine = cuda_graph, False
        # Beside the results, as a temporary folder may be in memory.
        self.work = folder / "processes"
        for length in plan.lengths:
            for model in plan.models:
                validate(self.recipe(model, length), world_size=1)

    def recipe(self, model: str, length: int) -> Recipe:
        """An entrant's recipe on this machine for a training at a length."""
        recipe = recipe_of(ENTRANTS[model].architecture, self.sizes, length)
        changes = surroundings_of(self.work / "run", self.work / "tokens")
        changes |= {"training.train_iters": WARM_UP[self.device] + self.plan.steps}
        changes |= ON_CPU if self.device == "cpu" else {}
        changes |= AS_A_GRAPH if self.cuda_graph else {}
        return changed(recipe, changes)

    def facts(self) -> dict[str, Any]:
        """What the measurements depend on; takes seconds, because it imports all packages. UserError if that fails."""
        with doing("looking at the machine"):
            found = self._result("machine", {"kind": "environment"})
        if reason := _failure(found):
            raise UserError(f"this installation cannot be used: {reason}; `txssm check gpu` says more")
        self.transformer_engine = found["packages"].get("Transformer Engine") == "right"
        settings: dict[str, Any] = {"preset": self.plan.preset, "steps": self.plan.steps, "cuda_graph": self.cuda_graph}
        settings |= {"micro_batch_tokens": self.sizes.micro_batch_tokens, "micro_batches": self.sizes.micro_batches}
        settings |= {"decoded_tokens": self.sizes.tokens, "precision": self._precision()}
        return {"benchmark": "throughput", "settings": settings, "machine": machine(self.device) | found}

    def _precision(self) -> str:
        return self.recipe(self.plan.models[0], self.plan.lengths[0]).training.precision

    def measure(self, unit: Unit) -> dict[Key, Figures]:
        """Figures or an error for each of the unit's keys."""
        refused = {key: {"error": reason} for key in unit.keys if (reason := self._misfit(key))}
        keys = [key for key in unit.keys if key not in refused]
        if not keys:
            return refused
        training = unit.lengths(TRAINING)
        found = self._trained(unit) if training else self._inferred(unit, keys)
        return refused | {key: figures | self._flops(key, figures) for key, figures in found.items()}

    def _flops(self, key: Key, figures: Figures) -> Figures:
        if "error" in figures:
            return {}
        return {"flops_per_token": model_flops(self.recipe(key.model, key.length), key.part, key.length)}

    def _misfit(self, key: Key) -> str | None:
        """Why a measurement would not fit a CPU's memory, where the system, not an exception, would end it."""
        if self.device == "cuda":
            return None
        recipe, needed = self.recipe(key.model, key.length), 0
        if key.part == DECODING:
            needed = cache_bytes(recipe, key.length)
        elif ENTRANTS[key.model].materialised:
            needed = COPIES_OF_SCORES * score_bytes(recipe, key.part, key.length)
        free = psutil.virtual_memory().available
        what = "keys and values" if key.part == DECODING else "attention's scores"
        return f"{what} of {needed / 2**30:.0f} GiB do not fit {free / 2**30:.0f} GiB" if needed > free else None

    def _trained(self, unit: Unit) -> dict[Key, Figures]:
        [key] = unit.keys
        recipe = self.recipe(unit.model, key.length)
        changes: Changes = {"run_directory": str(self.work / unit.name / "run")}
        changes["data.blend"] = ((1.0, str(tokens_for(self.work, recipe.data.vocab_size))),)
        changes |= self._on_gpu(unit.model) if self.device == "cuda" else {}
        found = self._result(unit.name, {"kind": "train"} | self._about(unit, changed(recipe, changes)))
        if reason := _failure(found):
            return {key: {"error": reason}}
        rows = [row for row in found["rows"] if "step_seconds" in row]
        seconds = [row["step_seconds"] for row in rows[WARM_UP[self.device] :]]
        peak = max(row["peak_memory_bytes"] for row in rows)
        tokens = recipe.training.global_batch_tokens
        return {key: {"tokens": tokens, "seconds": seconds, "peak_memory_bytes": peak}}

    def _on_gpu(self, model: str) -> Changes:
        """Transformer Engine's attention would not heed torch's choice of kernels."""
        if not self.transformer_engine:
            return LOCAL
        return {"megatron.attention_backend": "unfused"} if ENTRANTS[model].materialised else {}

    def _inferred(self, unit: Unit, keys: Sequence[Key]) -> dict[Key, Figures]:
        asked = {part: [key.length for key in keys if key.part == part] for part in (PREFILL, DECODING)}
        task = {"kind": "infer", "steps": self.plan.steps, "tokens": self.sizes.tokens} | asked
        task |= {"static_cache": ENTRANTS[unit.model].static_cache}
        recipe = changed(self.recipe(unit.model, keys[0].length), {"run_directory": str(self.work / "run")})
        found = self._result(unit.name, task | self._about(unit, recipe))
        if reason := _failure(found):
            return {key: {"error": reason} for key in keys}
        return {key: found[key.part][str(key.length)] for key in keys}

    def _about(self, unit: Unit, recipe: Recipe) -> dict[str, Any]:
        file = self.work / f"{unit.name}.recipe.yaml"
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        return {"recipe": str(file), "materialised": ENTRANTS[unit.model].materialised}

    def _result(self, name: str, task: dict[str, Any]) -> dict[str, Any]:
        """As `Child.wait`."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        task = {"device": self.device, "small": False} | task
        child = Child(self.work, name, task, hidden, waits=False, worker=WORKER)
        try:
            return child.wait(math.inf)
        finally:
            child.end()


def machine(device: Device) -> dict[str, Any]:
    """Processor, cores and memory, without a name of the machine, which differs between the nodes of a cluster."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": device,
        "processor": named[0] if named else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_GiB": round(psutil.virtual_memory().total / 2**30),
    }


def _failure(found: dict[str, Any]) -> str | None:
    return found.get("error") or found.get("refused")


@unwound_by_signals()
def throughput(plan: Plan, folder: Path, *, cuda_graph: bool = False, command: str = "") -> int:
    """Measure what is left of a plan and show everything; returns the exit code, 1 if something was not measured.

    folder: for results.json, which is written after every measurement, and results.png. UserError if measurements there
    were made with other settings or on another machine.
    """
    bench, failed = Bench(plan, folder, cuda_graph=cuda_graph), False
    with alone_in(folder, "--out"):
        try:
            _make_empty(bench.work)
            results = Results(folder, bench.facts())
            results.add({}, command=command, models=results.about.get("models", {}) | _models(bench))
            failed = _measure(bench, results)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be used: {error.strerror}; make room, or name another folder with --out"
            ) from None
        except KeyboardInterrupt:
            print("\nstopped; the same command continues", flush=True)
            raise
        finally:
            if not failed:
                shutil.rmtree(bench.work, ignore_errors=True)
        show(results)
    if failed:
        print(f"some were not measured; output of their processes: {bench.work}; the same command tries them again")
    return 1 if failed else 0


def show_folder(folder: Path) -> None:
    """Show what has been measured. UserError if the folder holds no results."""
    show(Results(folder))


def _measure(bench: Bench, results: Results) -> bool:
    """Measure the units that are left; returns whether one failed."""
    units = [*bench.plan.units()]
    left = [unit for unit in units if not all(map(results.has, unit.keys))]
    print(f"{len(units) - len(left)} of {len(units)} processes have measured; leave the machine alone", flush=True)
    failed = False
    with progress_bar("processes", len(left)) as advance:
        for unit in left:
            found = bench.measure(unit)
            results.add(found)
            failed |= any("error" in figures for figures in found.values())
            advance(1)
            print("; ".join(said(key, figures) for key, figures in found.items()), flush=True)
    return failed


def said(key: Key, figures: Figures) -> str:
    outcome = figures.get("error") or f"{rate(speed(figures))} tokens/s"
    return f"{key}: {outcome}"


def _models(bench: Bench) -> dict[str, Any]:
    recipes = {model: bench.recipe(model, bench.plan.lengths[0]) for model in bench.plan.models}
    return {model: {"parameters": count_parameters(recipe.sizes).total} for model, recipe in recipes.items()}


def _make_empty(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
    except OSError as error:
        raise UserError(f"{work} cannot be made: {error.strerror}; name another folder with --out") from None
