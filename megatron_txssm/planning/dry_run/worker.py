"""One rank of a dry run: builds a recipe's model as that rank of a world, trains two steps, writes what they used.

    python -m megatron_txssm.planning.dry_run.worker TASK.json

TASK is {"recipe": file, "result": file, "kernels": "gpu" or "local", "only_build": bool, "fake": bool}; torch's RANK and
WORLD_SIZE come from the environment. The result is {"usage": ...}, or {"refused": why} where Megatron or this project
refuses the recipe. With "fake" false, the ranks exist and train on real tensors, which tests compare with fake ones.
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError
from megatron_txssm.slurm.environment import end_with_parent


def main(task_file: str) -> None:
    end_with_parent()
    task = json.loads(Path(task_file).read_text(encoding="utf-8"))
    try:
        found = run(task)
    except UserError as error:
        found = {"refused": str(error)}
    result = Path(task["result"].format(rank=os.environ["RANK"]))
    # Written atomically: the parent may end this process at any time.
    part = result.with_suffix(".part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.replace(result)


def run(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    from megatron_txssm.platform import prepare_platform
    from megatron_txssm.recipe.loader import load_recipe
    from megatron_txssm.session.start import start_megatron

    torch.set_num_threads(1)
    prepare_platform()
    fake = task["fake"]
    from megatron_txssm.planning.dry_run.fakes import MEGATRON_ARGUMENTS, FakeWatch, on_fake_tensors

    recipe = load_recipe(task["recipe"])
    args = start_megatron(recipe, after=MEGATRON_ARGUMENTS if fake else MEGATRON_ARGUMENTS[2:], trains=False)
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import training

    from megatron_txssm.planning.dry_run.step import Rank, group_names, used_by_steps
    from megatron_txssm.planning.dry_run.watch import Watch

    training.initialize_megatron()
    names = group_names()
    watch = FakeWatch(names) if fake else Watch(names)
    with contextlib.ExitStack() as stack:
        if task["kernels"] == "gpu":
            from megatron_txssm.planning.dry_run.gpu_kernels import as_on_a_gpu

            stack.enter_context(as_on_a_gpu(args))
        if fake:
            stack.enter_context(on_fake_tensors())
        stack.enter_context(watch)
        rank = Rank(args, watch, fake=fake)
        if task["only_build"]:
            return {}
        usage = used_by_steps(rank, get_num_microbatches())
    found = dataclasses.asdict(usage)
    return {"usage": found | {"traffic": [[*key, size] for key, size in usage.traffic.items()]}}


if __name__ == "__main__":
    main(sys.argv[1])
