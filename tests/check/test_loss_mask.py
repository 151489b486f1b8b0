"""With a loss mask, ranks and micro-batches hold different numbers of tokens and still train what one process does."""

from pathlib import Path

import pytest

from megatron_txssm.check.layouts import ONE_PROCESS
from megatron_txssm.check.parity import verdict
from megatron_txssm.check.runs import RecipeRun, run_all
from megatron_txssm.check.shrink import shrink
from megatron_txssm.check.tokens import write_tokens
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe

RUNS = {
    "whole": (1, {"training.micro_batch_size": 8}),
    "unmasked": (1, {"training.micro_batch_size": 8, "training.mask_end_of_document": False}),
    "micro_batches": (1, {"training.micro_batch_size": 1}),
    "cp2": (2, {"training.micro_batch_size": 2, "parallel.context_parallel_size": 2}),
    "dp2": (2, {"training.micro_batch_size": 2}),
    "dp2_zero1": (2, {"training.micro_batch_size": 4, "parallel.use_distributed_optimizer": True}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RecipeRun]:
    folder: Path = tmp_path_factory.mktemp("mask")
    two_layers = ["model.layer_pattern=M-*-", "training.mask_end_of_document=true"]
    small = shrink(load_recipe("demo_cpu", two_layers), write_tokens(folder / "tokens"), nproc=2, steps=2)
    small = changed(small, ONE_PROCESS | {"training.global_batch_tokens": 8 * small.training.seq_length})
    made = {name: (size, RecipeRun(folder / name, changed(small, changes))) for name, (size, changes) in RUNS.items()}
    for processes in (1, 2):
        run_all(processes, [run for size, run in made.values() if size == processes], precision="fp64")
    return {name: run for name, (_, run) in made.items()}


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("whole", "unmasked")])
def test_other_parts_of_the_batch_make_the_same_step(runs: dict[str, RecipeRun], name: str) -> None:
    compared = verdict(runs[name], runs["whole"], "fp64")
    assert compared.same, compared


def test_the_mask_is_one(runs: dict[str, RecipeRun]) -> None:
    assert verdict(runs["unmasked"], runs["whole"], "fp64").loss_error > 1e-5
