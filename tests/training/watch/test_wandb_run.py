"""Weights & Biases sees one run, however often it is resumed; what begins again is another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.watch.wandb_run import name_wandb_run


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        # So that what a test sets is removed after it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")


def a_recipe(folder: Path, *fields: str) -> Recipe:
    return load_recipe("demo_cpu", [f"run_directory={folder}", "logging.wandb_project=trial", *fields])


def start(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The identity that a new process tells W&B."""
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    name_wandb_run(recipe)
    return os.environ.get("WANDB_RUN_ID")


def save(recipe: Recipe, step: str) -> None:
    recipe.checkpoint_path.mkdir(parents=True, exist_ok=True)
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text(step)


def test_a_resumed_run_keeps_its_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = a_recipe(tmp_path / "a")
    first = start(recipe, monkeypatch)
    assert first
    again = start(recipe, monkeypatch)
    assert again != first, "nothing was saved: it begins at step 0 again"
    save(recipe, "release")
    assert start(recipe, monkeypatch) not in (first, again), "so does it from imported weights"
    kept = start(recipe, monkeypatch)
    save(recipe, "20")
    assert start(recipe, monkeypatch) == start(recipe, monkeypatch) == kept
    assert start(a_recipe(tmp_path / "b"), monkeypatch) != kept


def test_the_users_own_environment_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_RESUME", "must")
    name_wandb_run(a_recipe(tmp_path))
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == ("mine", "must")


def test_the_last_rank_alone_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert start(a_recipe(tmp_path), monkeypatch) is None
    monkeypatch.setenv("RANK", "3")
    assert start(a_recipe(tmp_path, "logging.wandb_project=null"), monkeypatch) is None
    assert not list(tmp_path.iterdir())


SCRIPT = """
import json, os, sys
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training.watch.wandb_run import name_wandb_run

recipe = load_recipe("demo_cpu", [f"run_directory={sys.argv[1]}", "logging.wandb_project=trial"])
name_wandb_run(recipe)
import wandb
run = wandb.init(dir=sys.argv[1], name="trial", project="trial", config={"rank": 3})
run.config.update({"slurm_job_name": "one"})
run.config.update({"slurm_job_name": "another"})
print(json.dumps([run.id, run.settings.resume, dict(run.config)["slurm_job_name"]]))
run.finish()
"""


@pytest.mark.slow
def test_wandb_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, by W&B itself, which is told of two Slurm jobs."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "wandb" / "run_id").read_text().strip()
    assert json.loads(done.stdout.splitlines()[-1]) == [kept, "allow", "another"]
    assert [path for path in (tmp_path / "wandb").iterdir() if path.name.endswith(f"-{kept}")]
