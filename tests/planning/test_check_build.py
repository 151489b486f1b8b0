"""What a worker would refuse is refused before it is queued, in words."""

import json
import re
import subprocess
import tempfile
from typing import Any

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.planning import check_build
from megatron_txssm.planning.dry_run import run
from megatron_txssm.planning.dry_run.run import RankOf, run_ranks
from megatron_txssm.recipe.loader import load_recipe, recipe_names
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import smallest_world_size

# Token files, which need not be there, and a tokenizer of vocab_size tokens.
DATA = ("data.corpus=null", "data.blend=[[1, a]]", "data.tokenizer_type=NullTokenizer", "logging.eval_iters=1")
REFUSED = {
    # Megatron's assertions, of which two have no message.
    ("megatron.overlap_param_gather=true", "parallel.use_distributed_optimizer=false"): (
        "Megatron refuses the arguments: .*overlap-param-gather only supported with distributed optimizer"
    ),
    ("megatron.start_weight_decay=0.1",): r"refuses the arguments: AssertionError \(.*arguments.py:\d+: assert ",
    # Of the schedule, of the datasets.
    ("megatron.lr_warmup_init=1.0",): r"AssertionError \(.*assert self.init_lr <= self.max_lr",
    (*DATA, "data.split='99,1,0,0'"): r"AssertionError \(.*assert len\(split\) == len\(Split\)",
}
ACCEPTED = {
    # The demos' own; on made-up data, which the check uses where there are none, it would never end.
    "a validation over all data": ("logging.eval_iters=null",),
    "data": (*DATA, "data.split='99,1,0'"),
}


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(check_build.SWITCH)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """The results of building many recipes in one process, by a recipe's name or what is special about it."""
    recipes: dict[Any, Recipe] = {name: load_recipe(name) for name in recipe_names()}
    recipes |= {about: load_recipe("demo_cpu", changes) for about, changes in ACCEPTED.items()}
    recipes |= {changes: load_recipe("demo_cpu", changes) for changes in REFUSED}
    recipes["a checkpoint"] = load_recipe("demo_cpu", [f"run_directory={tmp_path_factory.mktemp('run')}"])
    checkpoints = recipes["a checkpoint"].checkpoint_path
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("20")
    ranks = [RankOf(check_build.buildable(recipe), smallest_world_size(recipe)) for recipe in recipes.values()]
    with pytest.MonkeyPatch.context() as patch:
        # It raises for the first one that is refused.
        patch.setattr(run, "_result", lambda file, done: json.loads(file.read_text()) if file.exists() else done)
        return dict(zip(recipes, run_ranks(ranks, kernels="local", only_build=True), strict=True))


@pytest.mark.slow
def test_every_recipe_is_built(built: dict[Any, dict[str, Any]]) -> None:
    assert [(name, built[name]) for name in recipe_names() if built[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("about", [*ACCEPTED, "a checkpoint"])
def test_what_a_worker_would_accept(built: dict[Any, dict[str, Any]], about: str) -> None:
    assert built[about] == {}


@pytest.mark.slow
@pytest.mark.parametrize("changes", REFUSED)
def test_what_a_worker_would_refuse(built: dict[Any, dict[str, Any]], changes: tuple[str, ...]) -> None:
    [(_, said)] = built[changes].items()
    assert re.search(REFUSED[changes], said)


def test_a_submission_says_why(switched_on: None) -> None:
    with pytest.raises(UserError, match=f"does not build this recipe: .*init_lr.*or set {check_build.SWITCH}=0"):
        check_build.check_build(load_recipe("demo_cpu", ["megatron.lr_warmup_init=1.0"]), 2)


def test_a_machine_that_cannot_build_warns(
    switched_on: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = subprocess.CompletedProcess([], -9, "", "a warning\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    check_build.check_build(load_recipe("demo_cpu"), 2)
    said = "not checked whether Megatron builds this recipe: SIGKILL ended its process; is memory short?"
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="this machine cannot build demo_cpu"):
        check_build.check_recipe("demo_cpu")


def test_nowhere_to_write_warns(
    switched_on: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/full")
    check_build.check_build(load_recipe("demo_cpu"), 2)
    assert "warning: not checked whether Megatron builds this recipe: " in capsys.readouterr().err
