"""What is found to be NaN or infinite, and the words for it: rank, verdict, last sound step and the way back."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_txssm.platform import prepare_platform
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe

prepare_platform()

from megatron.core.rerun_state_machine import Call, Caller, RerunState

from megatron_txssm.checkpoint import compat_saves
from megatron_txssm.checkpoint.steps import Step
from megatron_txssm.training import not_finite, saving
from megatron_txssm.training.finite import first_not_finite
from megatron_txssm.training.saving import explain_full_disk, warn_without_room

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("demo_cpu", [f"run_directory={tmp_path}/a run"])


def trained() -> tuple[torch.nn.Linear, Any]:
    """A model after a step of Adam, and Megatron's frame round the optimizer."""
    model = torch.nn.Linear(3, 2)
    adam = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    adam.step()
    return model, SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_or_a_moment_that_is_not_finite_is_named(value: float) -> None:
    model, optimizer = trained()
    assert first_not_finite([model], optimizer) == ""
    moment = optimizer.chained_optimizers[0].optimizer.state[model.weight]["exp_avg_sq"]
    moment[1, 2] = value
    assert first_not_finite([model]) == ""
    assert first_not_finite([model], optimizer) == "the optimizer's exp_avg_sq on rank 0"
    with torch.no_grad():
        model.bias[0] = value
    assert first_not_finite([model], optimizer) == "the weight bias on rank 0"


def test_large_weights_are_finite_though_their_sum_is_not() -> None:
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(3e38)
    assert first_not_finite([model]) == ""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Megatron's, that has found NaN on this rank at step 27."""
    call = Call(Caller(message="found NaN in local grad norm", rank=0), 0)
    machine = SimpleNamespace(state=RerunState.RERUNNING_IN_PLACE, failed_validation_call=call)
    monkeypatch.setattr("megatron.core.rerun_state_machine.get_rerun_state_machine", lambda: machine)
    monkeypatch.setattr("megatron_txssm.compat.get_args", lambda: SimpleNamespace(curr_iteration=26))
    return machine


@pytest.mark.parametrize(
    ("code", "state", "verdict"),
    [
        (
            16,
            RerunState.WILL_RERUN_FROM_CHECKPOINT,
            "it came out the same: the training diverges, or that GPU is broken",
        ),
        (17, RerunState.RERUNNING_IN_PLACE, "it came out differently: a passing error of that GPU is likely"),
        (17, RerunState.RERUNNING_FROM_CHECKPOINT, "it was computed again on another GPU"),
    ],
)
def test_each_verdict_has_its_words(recipe: Recipe, machine: Any, code: int, state: RerunState, verdict: str) -> None:
    machine.state = state
    said = not_finite.explain_not_finite(recipe, code)
    assert said.startswith("the loss or a gradient of step 27 is NaN or infinite on rank 0 (node ")
    assert "found NaN in local grad norm" in said
    assert f"{verdict} (Megatron's exit code {code}). " in said
    assert "No checkpoint has finite weights" in said


def test_the_way_back_is_a_command_that_a_shell_takes(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Step(20, recipe.checkpoint_path / "iter_0000020")
    monkeypatch.setattr(not_finite, "newest_finite", lambda folder, seconds: sound)
    recipe.checkpoint_path.mkdir(parents=True)
    tracker = recipe.checkpoint_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("40")
    said = not_finite.way_back(recipe)
    assert "sound checkpoint is that of step 20: its weights were read and are finite" in said
    command = said.partition("learning rate: ")[2]
    first, _, second = command.partition(" && ")
    subprocess.run(first, shell=True, check=True)
    assert tracker.read_text() == "20\n"
    assert second.startswith(
        f"txssm pretrain '{recipe.run_path.absolute()}/recipe.yaml' --set optimizer.learning_rate="
    )
    # It is the newest now.
    assert not_finite.way_back(recipe).endswith(second)
    assert "echo" not in not_finite.way_back(recipe)


def test_a_next_save_that_will_not_fit_is_told(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**12, free=2 * 10**9))
    warn_without_room(recipe, 2 * 10**9, said.append)
    assert said == []
    warn_without_room(recipe, 3 * 10**9, said.append)
    assert "has 2.00 GB left, and the next checkpoint takes 3.00 GB: make room" in said[0]


@pytest.mark.parametrize(("number", "words"), [(28, "No space left on device"), (122, "Disk quota exceeded")])
def test_a_full_disk_is_told_in_the_systems_words(recipe: Recipe, number: int, words: str) -> None:
    error = explain_full_disk(recipe, OSError(number, os.strerror(number)))
    assert isinstance(error, RuntimeError)
    assert words in str(error)
    assert "the same command starts from the beginning" in str(error)
    other = OSError(5, "Input/output error")
    assert explain_full_disk(recipe, other) is other


def test_a_quota_that_is_used_up_in_a_save(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = recipe.checkpoint_path / "iter_0000020"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(bytes(2_000_000))
    monkeypatch.setattr(compat_saves, "failed_writes", [compat_saves.FailedWrite(122, os.strerror(122))])
    said = saving._failed_save(recipe, 20, RuntimeError("Worker failure"))
    assert "the checkpoint of step 20 could not be written" in said
    assert "[Errno 122] Disk quota exceeded (`quota` or `lfs quota` shows how much of the quota is left" in said
    assert "what it had written (2 MB) was removed" in said
    assert "the same command starts from the beginning" in said
    assert not partial.exists()
