"""What a worker would refuse is refused before it is queued, in words."""

import subprocess
import tempfile
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.planning import check_build
from megatron_txssm.planning.dry_run.run import WITHOUT_DATA, RankOf, run_ranks
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe, recipe_names
from megatron_txssm.recipe.sizes import smallest_world_size

REFUSED = {
    # Megatron's assertions, of which two have no message.
    "megatron.overlap_param_gather=true": "overlap-param-gather only supported with distributed optimizer",
    "megatron.start_weight_decay=0.1": r"Megatron refuses the arguments: AssertionError \(.*arguments.py:\d+: assert ",
    "megatron.lr_warmup_init=1.0": r"does not build this recipe: AssertionError \(.*assert self.init_lr <= self.max_lr",
}


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(check_build.SWITCH)


@pytest.mark.slow
def test_every_recipe_is_built() -> None:
    names = recipe_names()
    recipes = [changed(load_recipe(name), WITHOUT_DATA) for name in names]
    ranks = [RankOf(recipe, smallest_world_size(recipe)) for recipe in recipes]
    found = run_ranks(ranks, kernels="local", only_build=True)
    assert [(name, result) for name, result in zip(names, found, strict=True) if result] == []


@pytest.mark.parametrize("field", REFUSED)
def test_what_a_worker_would_refuse(switched_on: None, field: str) -> None:
    recipe = load_recipe("demo_cpu", [field, "parallel.use_distributed_optimizer=false"])
    with pytest.raises(UserError, match=REFUSED[field]):
        check_build.check_build(recipe, 2)


def test_a_machine_that_cannot_build_warns(
    switched_on: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    check_build.check_build(load_recipe("demo_cpu"), 2)
    assert "not checked whether Megatron builds this recipe" in capsys.readouterr().err
    with pytest.raises(UserError, match="this machine cannot build demo_cpu"):
        check_build.check_recipe("demo_cpu")


def test_nowhere_to_write_warns(
    switched_on: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/full")
    check_build.check_build(load_recipe("demo_cpu"), 2)
    assert "warning: not checked whether Megatron builds this recipe: " in capsys.readouterr().err


def test_a_validation_over_all_data_is_no_mistake(switched_on: None) -> None:
    """The demos' own; on made-up data, which the check uses, it would never end."""
    recipe = load_recipe("demo_cpu")
    assert recipe.logging.eval_iters is None
    check_build.check_build(recipe, 2)


def test_a_run_with_a_checkpoint_is_submitted_again(switched_on: None, tmp_path: Path) -> None:
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}"])
    recipe.checkpoint_path.mkdir(parents=True)
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text("20")
    check_build.check_build(recipe, 2)
