"""Dry runs, one after another: each builds a recipe's model as one rank and writes what two steps of it used.

    python -m megatron_txssm.planning.dry_run.worker TASKS.json

TASKS are {"recipe": file, "result": file, "world_size": N, "rank": N, "kernels": "gpu" or "local", "only_build": bool}.
A result is {"usage": ...}, or {} where all was only built; {"refused": why} where this project or Megatron's
parser refuses the recipe, {"failed": why} where something else in it raises.
"""

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError, described
from megatron_txssm.slurm.environment import end_with_parent


def main(tasks_file: str) -> None:
    end_with_parent()
    import torch

    from megatron_txssm.platform import prepare_platform

    prepare_platform()
    from megatron_txssm.compat import forget_training

    for task in json.loads(Path(tasks_file).read_text(encoding="utf-8")):
        os.environ.update(RANK=str(task["rank"]), WORLD_SIZE=str(task["world_size"]))
        try:
            found = run(task)
        except UserError as error:
            found = {"refused": str(error)}
        except Exception as error:
            traceback.print_exc()
            found = {"failed": described(error)}
        write(found, Path(task["result"]))
        forget_training()
        # The next task's world is another one.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def write(found: dict[str, Any], result: Path) -> None:
    # Atomically: the parent may end this process at any time.
    part = result.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(result)


def run(task: dict[str, Any], *, fake: bool = True) -> dict[str, Any]:
    """A task's result.

    fake False: the ranks exist and train on real tensors, which tests compare with fake ones; traffic is that of a step
    of all micro-batches.
    """
    import torch

    from megatron_txssm.recipe.loader import load_recipe
    from megatron_txssm.session.start import start_megatron

    torch.set_num_threads(1)
    from megatron_txssm.planning.dry_run.fakes import (
        FAKE_PROCESSES,
        WITHOUT_A_LOOK_AT_VALUES,
        FakeWatch,
        on_fake_tensors,
    )

    arguments = (*FAKE_PROCESSES, *WITHOUT_A_LOOK_AT_VALUES) if fake else WITHOUT_A_LOOK_AT_VALUES
    args = start_megatron(load_recipe(task["recipe"]), after=arguments, trains=False)
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import training

    from megatron_txssm.planning.dry_run.step import Rank, group_names, traffic_of_a_step, used_by_steps
    from megatron_txssm.planning.dry_run.watch import Watch
    from megatron_txssm.training.forward_step import dataset_builder

    training.initialize_megatron()
    watch = FakeWatch(group_names()) if fake else Watch(group_names())
    with contextlib.ExitStack() as stack:
        if task["kernels"] == "gpu":
            from megatron_txssm.planning.dry_run.gpu_kernels import as_on_a_gpu

            stack.enter_context(as_on_a_gpu(args))
        if fake:
            stack.enter_context(on_fake_tensors())
        stack.enter_context(watch)
        rank = Rank(args, watch, fake=fake)
        if task["only_build"]:
            dataset_builder(training.get_train_valid_test_num_samples())
            return {}
        usage = used_by_steps(rank, get_num_microbatches())
        if not fake:
            usage = dataclasses.replace(usage, traffic=traffic_of_a_step(rank, get_num_microbatches()))
    found = dataclasses.asdict(usage)
    return {"usage": found | {"traffic": [[*key, size] for key, size in usage.traffic.items()]}}


if __name__ == "__main__":
    main(sys.argv[1])
