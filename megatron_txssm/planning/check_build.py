"""Builds a recipe once before it is queued: what a worker would refuse after hours in the queue is refused now."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_txssm.errors import UserError, require_positive
from megatron_txssm.planning.dry_run.run import MOCK_DATA, WITHOUT_RUN, DryRunFailed, RankOf, run_ranks
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import data_parallel_size, smallest_world_size
from megatron_txssm.recipe.validation.data_checks import check_tokenizer_file
from megatron_txssm.recipe.validation.evaluation_checks import check_task_files
from megatron_txssm.terminal import doing
from megatron_txssm.training.launch.preflight import number_of_shards

# Set to 0, in slurm/env.sh for example, it turns the check off.
SWITCH = "TXSSM_CHECK_BUILD"


def check_recipe(
    recipe: str | Path,
    *,
    overrides: Sequence[str] = (),
    gpus: int | None = None,
    check: Callable[[Recipe], None] | None = None,
) -> int:
    """Build a recipe once and say so; returns the exit code.

    gpus: processes; default: as few as its layout allows. check: as for `jobs.submit.submit`.
    """
    loaded = load_recipe(recipe, overrides)
    if gpus is not None:
        require_positive(gpus=gpus)
    world_size = gpus or smallest_world_size(loaded)
    data_parallel_size(loaded, world_size)
    check_task_files(loaded)
    if check is not None:
        check(loaded)
    try:
        _build(loaded, world_size, "change it")
    except DryRunFailed as error:
        raise UserError(f"this machine cannot build {loaded.name}: {error}") from error
    print(f"{loaded.name}: Megatron accepts and builds it, on {world_size} process{'es' if world_size > 1 else ''}")
    if absent := _absent_data(loaded):
        print(f"not checked, as its data are not here: {absent}")
    return 0


def check_build(recipe: Recipe, world_size: int) -> None:
    """UserError if Megatron or this project refuses the recipe, its model, optimizer, schedule or datasets.

    The first and last of `world_size` ranks are built on fake tensors, in a process of their own and in seconds. A
    machine that cannot do this, for lack of memory for example, is no reason to refuse: a warning says so.
    """
    if os.environ.get(SWITCH) == "0":
        return
    try:
        _build(recipe, world_size, f"change it, or set {SWITCH}=0")
    except DryRunFailed as error:
        print(f"warning: not checked whether Megatron builds this recipe: {error}", file=sys.stderr)


def _build(recipe: Recipe, world_size: int, remedy: str) -> None:
    recipe = buildable(recipe)
    ranks = [RankOf(recipe, world_size, rank) for rank in sorted({0, world_size - 1})]
    with doing("building the model once, on fake tensors"):
        results = run_ranks(ranks, kernels="local", only_build=True)
    for found in results:
        if "failed" in found:
            raise UserError(f"Megatron does not build this recipe: {found['failed']}; {remedy}")


def buildable(recipe: Recipe) -> Recipe:
    """The recipe apart from its run's folder and, where they are not here, its data."""
    return changed(recipe, WITHOUT_RUN | MOCK_DATA if _absent_data(recipe) else WITHOUT_RUN)


def _absent_data(recipe: Recipe) -> str:
    """Why Megatron's datasets cannot be configured here; empty if they can. Token files need not be there for that."""
    try:
        number_of_shards(recipe)
        check_tokenizer_file(recipe)
    except UserError as error:
        return str(error)
    return ""
