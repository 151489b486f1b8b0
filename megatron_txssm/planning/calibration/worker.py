"""One rank of training steps that are timed, one recipe after another.

    torchrun --nproc-per-node N -m megatron_txssm.planning.calibration.worker TASKS.json

TASKS are {"recipe": file, "result": file, "steps": N, "parts": bool}; "parts": also those of a step, and the machine's
rates. Rank 0 writes the results.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_txssm.errors import UserError, described
from megatron_txssm.planning.dry_run.worker import write
from megatron_txssm.platform import prepare_platform
from megatron_txssm.slurm.environment import end_with_launcher

# Steps before the first that is timed.
WARM_UP = 2


def main(tasks_file: str) -> None:
    end_with_launcher()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    prepare_platform()
    from megatron_txssm.compat import forget_training

    for task in json.loads(Path(tasks_file).read_text(encoding="utf-8")):
        try:
            found = run(task)
        except UserError as error:
            found = {"refused": str(error)}
        except Exception as error:
            # The other ranks wait in a collective, so the launcher must end them.
            write({"failed": described(error)}, Path(task["result"]))
            raise
        if os.environ["RANK"] == "0":
            write(found, Path(task["result"]))
        forget_training()


def run(task: dict[str, Any]) -> dict[str, Any]:
    from megatron.training import training

    from megatron_txssm.planning.calibration.collectives import measure_links
    from megatron_txssm.planning.calibration.parts import Parts
    from megatron_txssm.planning.dry_run.fakes import WITHOUT_A_LOOK_AT_VALUES
    from megatron_txssm.planning.dry_run.step import Rank, group_names
    from megatron_txssm.planning.dry_run.watch import Watch
    from megatron_txssm.recipe.loader import load_recipe
    from megatron_txssm.session.start import start_megatron

    recipe = load_recipe(task["recipe"])
    args = start_megatron(recipe, after=WITHOUT_A_LOOK_AT_VALUES, trains=False)
    training.initialize_megatron()
    rank = Rank(args, Watch(group_names()), fake=False)
    if not task["parts"]:
        return {"steps": [timed_step(rank) for _ in range(WARM_UP + task["steps"])][WARM_UP:]}
    parts = Parts(rank.models[0], recipe.layers)
    steps: list[float] = []
    optimizer = time_optimizer(rank)
    with parts.timed():
        for number in range(WARM_UP + task["steps"]):
            steps.append(timed_step(rank))
            parts.collect() if number >= WARM_UP else parts.forget()
    return {
        "steps": steps[WARM_UP:],
        "parts": parts.medians(),
        "outside": statistics.median(parts.outside),
        "passes": statistics.median(parts.passes),
        "optimizer": statistics.median(optimizer[WARM_UP:]),
        "links": {name: vars(link) for name, link in measure_links().items()} if dist.get_world_size() > 1 else {},
        **machine(args.params_dtype),
    }


def timed_step(rank: Any) -> float:
    """Seconds of one step, from when all ranks are ready until the slowest has done it."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    synchronize()
    dist.barrier()
    began = time.perf_counter()
    rank.step(get_num_microbatches())
    synchronize()
    dist.barrier()
    return time.perf_counter() - began


def time_optimizer(rank: Any) -> list[float]:
    """Seconds of each call of the optimizer from now on."""
    found: list[float] = []
    step = rank.optimizer.step

    def timed() -> Any:
        synchronize()
        began = time.perf_counter()
        result = step()
        synchronize()
        found.append(time.perf_counter() - began)
        return result

    rank.optimizer.step = timed
    return found


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(dtype: torch.dtype) -> dict[str, Any]:
    """The device's name; of a CPU also what each rank reaches while all compute: FLOP/s, bytes of memory a second.

    "alone": how much faster the first rank computes while the others wait.
    """
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name()}
    size = 1024
    matrix, block = torch.randn(size, size, dtype=dtype), torch.zeros(2**26, dtype=torch.uint8)
    copied = torch.empty_like(block)
    together = median_seconds(lambda: matrix @ matrix)
    alone = median_seconds(lambda: matrix @ matrix if dist.get_rank() == 0 else None)
    return {
        "device": "cpu",
        "flops": 2 * size**3 / together,
        "bandwidth": 2 * block.numel() / median_seconds(lambda: copied.copy_(block)),
        "alone": max(1.0, together / alone),
    }


def median_seconds(work: Any, count: int = 7) -> float:
    found: list[float] = []
    for _ in range(count):
        dist.barrier()
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


if __name__ == "__main__":
    main(sys.argv[1])
