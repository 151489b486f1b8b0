"""One process of `txssm check gpu`: reads its task from a file and writes its result to another.

    python -m megatron_txssm.check.gpu.worker TASK.json

TASK is {"kind": a key of KINDS, "result": file, "turn": file or null, ...}. A training waits for the file `turn` after
its imports: it then has the GPU to itself, while the next one imports.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_txssm.errors import UserError
from megatron_txssm.slurm.environment import end_with_parent

if TYPE_CHECKING:
    from megatron_txssm.recipe.recipe import Recipe


type Kinds = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]


def main(task_file: str, kinds: Kinds) -> int:
    """Do the task of one of the `kinds`; returns the exit code."""
    end_with_parent()
    task = json.loads(Path(task_file).read_text(encoding="utf-8"))
    if os.getppid() != task["parent"]:
        # The parent ended before it could be watched.
        return 1
    try:
        found = kinds[task["kind"]](task)
    except UserError as error:
        print(f"error: {error}", flush=True)
        return 2
    result = Path(task["result"])
    # Written atomically: the parent may end this process at any time.
    part = result.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(result)
    return 0


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Train the recipe in the file `recipe`; returns its rows of metrics.jsonl, its FLOPs per token, and the device."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    from megatron_txssm.architecture.flops import flops_per_token
    from megatron_txssm.recipe.loader import load_recipe
    from megatron_txssm.session.start import prepare_kernels
    from megatron_txssm.training.pretrain import pretrain, run_worker

    def prepare_and_train(recipe: "Recipe", terminal: TextIO) -> None:
        prepare_kernels(recipe)
        from megatron_txssm.platform import prepare_platform

        prepare_platform()
        import megatron.training  # noqa: F401

        while task["turn"] and not Path(task["turn"]).exists():
            time.sleep(0.02)
        pretrain(recipe, terminal)

    recipe = load_recipe(task["recipe"])
    run_worker(recipe, prepare_and_train)
    import torch

    from megatron_txssm.metrics import metrics_lines

    metrics = recipe.run_path / "metrics.jsonl"
    return {
        "rows": metrics_lines(metrics),
        "flops_per_token": flops_per_token(recipe.sizes, recipe.training.seq_length),
        "device": torch.cuda.get_device_name(0) if task["device"] == "cuda" else "CPU",
    }


def environment(task: dict[str, Any]) -> dict[str, Any]:
    from megatron_txssm.check.gpu.measurements.environment import describe

    return describe(task["device"])


def kernels(task: dict[str, Any]) -> dict[str, Any]:
    from megatron_txssm.check.gpu.measurements.kernels import errors

    return errors(task["device"], small=task["small"])


def scan_speed(task: dict[str, Any]) -> dict[str, Any]:
    from megatron_txssm.check.gpu.measurements.scan_speed import milliseconds

    return milliseconds(task["device"], small=task["small"])


def decoding(task: dict[str, Any]) -> dict[str, Any]:
    from megatron_txssm.check.gpu.measurements.decoding import tokens_per_second

    return tokens_per_second(task["device"], small=task["small"])


def bandwidth(task: dict[str, Any]) -> dict[str, Any]:
    """All-reduce over the node's GPUs, by the program that a job's preflight also runs; {} with one GPU."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return {}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    words = [*launch, "-m", "megatron_txssm.jobs.nodes.bandwidth_check", "--megabytes=512", "--timeout=60"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line) | {"gpus": count}


KINDS: Kinds = {
    "environment": environment,
    "train": train,
    "kernels": kernels,
    "scan_speed": scan_speed,
    "decoding": decoding,
    "bandwidth": bandwidth,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], KINDS))
