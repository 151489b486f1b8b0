"""Runs that remove their old checkpoints compute what they would have otherwise; a merge of the rest is a model."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_txssm.checkpoint.merging import merge
from megatron_txssm.checkpoint.saved_model import read_weights
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from tests.checkpoint.some_checkpoints import steps_in
from tests.support.megatron_tasks import Task, run_tasks, train
from tests.support.tiny_run import make_tiny_run

pytestmark = pytest.mark.slow


def interrupt_a_removal(checkpoints: Path) -> None:
    """A task: what a run leaves that was killed while it removed step 2."""
    shutil.copytree(checkpoints / "iter_0000004", checkpoints / "removed_iter_0000002_0123abcd")
    (checkpoints / "removed_iter_0000002_0123abcd" / "__0_0.distcp").unlink()


def evaluate(run: Path) -> None:
    """A task: a worker of `txssm eval loss`."""
    from megatron_txssm.evaluation.evaluate import evaluate_as_worker, evaluation_recipe
    from megatron_txssm.training.launch.preflight import make_run_directory

    recipe = evaluation_recipe(run, ["logging.eval_iters=1"])
    make_run_directory(recipe)
    with open(os.devnull, "w", encoding="utf-8") as terminal:
        evaluate_as_worker(recipe, terminal)


@dataclass(frozen=True)
class Runs:
    """The run folders of one recipe."""

    folder: Path

    def checkpoints(self, name: str) -> Path:
        return self.folder / name / "checkpoints"

    def losses(self, name: str) -> dict[int, float]:
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return {line["iteration"]: line["lm loss"] for line in lines if "grad_norm" in line}

    def weights(self, name: str, step: int) -> dict[str, torch.Tensor]:
        return dict(read_weights(self.checkpoints(name) / f"iter_{step:07d}"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("kept")
    tiny = load_recipe(str(make_tiny_run(folder / "tiny").recipe))
    made = Runs(folder)
    merged = made.checkpoints("plain").parent / "merged" / "mean_6_to_8"

    def training(run: str, last: int, changes: Changes) -> Task:
        common = {"run_directory": str(folder / run), "checkpoint.save_interval": 2, "megatron.exit_interval": last}
        file = folder / f"{run}_{last}.yaml"
        file.write_text(changed(tiny, common | changes).to_yaml())
        return train, {"recipe": file}

    kept: Changes = {"checkpoint.keep_last": 1, "checkpoint.keep_every": 4}
    begun: Changes = {"checkpoint.load_from": str(merged / "checkpoints"), "optimizer.learning_rate": 1e-30}
    tasks: list[Task] = [
        training("plain", 8, {}),
        training("kept", 6, kept),
        (interrupt_a_removal, {"checkpoints": made.checkpoints("kept")}),
        training("kept", 8, kept),
        training("asynchronous", 8, {"checkpoint.keep_last": 1, "megatron.async_save": True}),
        (merge, {"run": folder / "plain", "last": 2}),
        (evaluate, {"run": merged}),
        training("begun", 2, begun),
    ]
    run_tasks(1, tasks, folder / "ranks")
    return made


def test_a_resumed_run_keeps_what_its_recipe_says_and_computes_the_same(runs: Runs) -> None:
    assert steps_in(runs.checkpoints("plain")) == [2, 4, 6, 8]
    assert steps_in(runs.checkpoints("kept")) == [4, 8]
    assert not list(runs.checkpoints("kept").glob("removed_*"))
    assert runs.losses("kept") == runs.losses("plain")
    ours, theirs = runs.weights("kept", 8), runs.weights("plain", 8)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_asynchronous_save_removes_when_it_has_ended(runs: Runs) -> None:
    assert steps_in(runs.checkpoints("asynchronous")) == [8]
    assert runs.losses("asynchronous") == runs.losses("plain")


def test_a_merge_is_evaluated(runs: Runs) -> None:
    said = json.loads((runs.folder / "plain/merged/mean_6_to_8/evaluation/validation.json").read_text())
    assert said["step"] == 8
    [found] = said["sets"].values()
    assert 0 < found["loss"] < 10 and found["tokens"] > 0


def test_a_run_begins_with_the_weights_of_a_merge(runs: Runs) -> None:
    """Its learning rate changes none of them."""
    begun, merged = runs.weights("begun", 2), runs.weights("plain/merged/mean_6_to_8", 8)
    parts = [runs.weights("plain", step) for step in (6, 8)]
    assert begun.keys() == merged.keys()
    for name, tensor in begun.items():
        assert torch.equal(tensor, merged[name]), name
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)
