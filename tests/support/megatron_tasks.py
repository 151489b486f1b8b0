"""Many pieces of Megatron's work on the same ranks: a start of Megatron takes longer than any of them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_txssm.recipe.loader import load_recipe
from tests.support.ranks import join_ranks, run_ranks

# A function of a module, and its arguments.
Task = tuple[Callable[..., Any], dict[str, Any]]


def run_tasks(world_size: int, tasks: Sequence[Task], folder: Path) -> None:
    """Do `tasks` one after another on this many ranks; each starts Megatron anew. `folder` is a new one."""
    run_ranks(_do, world_size, folder, tasks, folder)


def _do(tasks: Sequence[Task], folder: Path) -> None:
    import torch.distributed
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training import training

    from megatron_txssm.compat import mend_megatron

    mend_megatron()
    for number, (task, arguments) in enumerate(tasks):
        if not torch.distributed.is_initialized():
            join_ranks(folder / f"store_{number}")
        task(**arguments)
        training.destroy_global_state()
        destroy_moe_metrics_tracker()


def train(recipe: Path) -> None:
    """A task: a whole run, as a worker of `txssm pretrain` does it."""
    from megatron_txssm.training.launch.preflight import make_run_directory
    from megatron_txssm.training.pretrain import pretrain

    loaded = load_recipe(recipe)
    make_run_directory(loaded)
    with open(os.devnull, "w", encoding="utf-8") as terminal:
        pretrain(loaded, terminal)
