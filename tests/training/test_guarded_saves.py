"""What is done around a save, in this order: signals wait, weights are proved, then files are touched."""

import signal
from pathlib import Path
from typing import Any

import pytest
from megatron.training import training

from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.session.hooks import Call, listen, listening
from megatron_txssm.training import saving
from megatron_txssm.training.saving import GuardedSaves

loop: Any = training


class Saves:
    """Megatron's saves and what surrounds them, which only write down that they happen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.recipe = load_recipe("demo_cpu", [f"run_directory={folder}"])
        self.happened: list[Any] = []
        self.failing: str | None = None
        for name in ("describe_checkpoints", "empty_folder", "refuse_broken_weights"):
            monkeypatch.setattr(saving, name, lambda *words, name=name: self.note(name))
        monkeypatch.setattr(saving, "_failed_save", lambda recipe, step, error: f"step {step}: {error}")
        monkeypatch.setattr(training, "save_checkpoint", self.save_checkpoint)
        monkeypatch.setattr(training, "maybe_finalize_async_save", self.maybe_finalize_async_save)

    def note(self, what: str) -> None:
        blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.happened.append(what if blocked else f"{what} unshielded")
        if what == self.failing:
            raise OSError("no room")

    def save_checkpoint(self, iteration: int, model: Any, optimizer: Any, non_persistent_ckpt: bool = False) -> str:
        self.note("save")
        return "saved"

    def maybe_finalize_async_save(self, blocking: bool = False) -> None:
        self.note("finalize unshielded")


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Saves:
    return Saves(monkeypatch, tmp_path)


def test_a_save_in_its_order(saves: Saves) -> None:
    with listening(GuardedSaves(saves.recipe, 0)):
        assert loop.save_checkpoint(3, None, None) == "saved"
        assert saves.happened == ["refuse_broken_weights", "describe_checkpoints", "empty_folder", "save"]
        saves.happened.clear()
        # Another training of this process, or the same once more.
        listen(GuardedSaves(saves.recipe, 0))
        loop.save_checkpoint(6, None, None)
        assert saves.happened == ["refuse_broken_weights", "empty_folder", "save"], "described once"
        saves.happened.clear()
        loop.save_checkpoint(7, None, None, non_persistent_ckpt=True)
        assert saves.happened == ["refuse_broken_weights", "save"], "its folder is another"
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_one_rank_describes(saves: Saves) -> None:
    with listening(GuardedSaves(saves.recipe, 1)):
        loop.save_checkpoint(3, None, None)
    assert saves.happened == ["refuse_broken_weights", "empty_folder", "save"]


def test_megatrons_part_is_explained_with_its_step(saves: Saves) -> None:
    with listening(GuardedSaves(saves.recipe, 0), GuardedSaves(saves.recipe, 0)):
        saves.failing = "describe_checkpoints"
        with pytest.raises(OSError, match=r"^no room$"):
            loop.save_checkpoint(2, None, None)
        saves.failing = "save"
        with pytest.raises(RuntimeError, match=r"^step 3: no room$") as caught:
            loop.save_checkpoint(3, None, None)
        assert isinstance(caught.value.__cause__, OSError)
        saves.failing = None
        loop.save_checkpoint(5, None, None)
        saves.failing = "finalize unshielded"
        with pytest.raises(RuntimeError, match=r"^step 5: no room$"):
            loop.maybe_finalize_async_save(blocking=True)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_broken_weights_are_refused_when_an_earlier_save_is_whole(
    saves: Saves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(training, "maybe_finalize_async_save", saves.maybe_finalize_async_save)
    monkeypatch.setattr("megatron_txssm.training.finite.first_not_finite", lambda model, optimizer: "a weight")
    monkeypatch.setattr("megatron_txssm.training.not_finite.way_back", lambda recipe: "Go back.")
    monkeypatch.setattr("megatron.core.rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE", None)
    call = Call(iteration=4, model=None, optimizer=None, non_persistent_ckpt=False)
    with pytest.raises(FloatingPointError, match=r"^a weight is NaN or infinite after step 4, which is not saved .*Go"):
        saving.refuse_broken_weights(saves.recipe, call)
    assert saves.happened == ["finalize unshielded unshielded"]
