"""What is found wrong before a run starts."""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_txssm.checkpoint.checksums import DamagedCheckpoint
from megatron_txssm.checkpoint.steps import Step, find_newest
from megatron_txssm.errors import UserError
from megatron_txssm.recipe import changes
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import checkpoint_bytes
from megatron_txssm.training.launch import preflight
from megatron_txssm.training.launch.preflight import (
    changed_data,
    check_checkpoint,
    check_files,
    check_room,
    check_run,
    is_finished,
    make_run_directory,
    saved_step,
    warnings,
)
from megatron_txssm.training.processes import launch


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("demo_cpu", [f"run_directory={tmp_path}/run"])


def save(recipe: Recipe, step: str = "40\n") -> None:
    recipe.checkpoint_path.mkdir(parents=True)
    (recipe.checkpoint_path / "recipe.yaml").write_text(recipe.to_yaml())
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text(step)
    name = f"iter_{int(step):07d}" if step.strip().isdecimal() else "release"
    whole(recipe.checkpoint_path / name)


def whole(folder: Path) -> Path:
    """As torch_dist leaves it."""
    folder.mkdir(exist_ok=True)
    for name in (".metadata", "metadata.json"):
        (folder / name).write_text("{}")
    return folder


def finish(recipe: Recipe) -> Path:
    """The folder of the last step's checkpoint."""
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text(str(recipe.train_iters))
    return whole(recipe.checkpoint_path / f"iter_{recipe.train_iters:07d}")


def changed(recipe: Recipe, **model: object) -> Recipe:
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **model))


def test_no_checkpoint_and_the_same_model_are_fine(recipe: Recipe) -> None:
    check_checkpoint(recipe)
    save(recipe)
    check_checkpoint(recipe)
    # These change how the model is computed, not what is saved.
    check_checkpoint(changed(recipe, chunk_size=32, ssd_backend="torch", init_method_std=0.5))


@pytest.mark.parametrize(
    ("field", "value"),
    [("state_size", 6), ("layer_pattern", "*-*-"), ("position_encoding", "conv1d_d"), ("state_dt_bias", False)],
)
def test_another_model_is_named_with_the_field(recipe: Recipe, field: str, value: object) -> None:
    save(recipe)
    with pytest.raises(UserError) as error:
        check_checkpoint(changed(recipe, **{field: value}))
    message = str(error.value)
    assert f"model.{field}: {getattr(recipe.model, field)} there, {value} here" in message
    assert str(recipe.checkpoint_path) in message
    assert "use another run_directory" in message


def test_a_checkpoint_older_than_a_field_has_its_default(recipe: Recipe) -> None:
    save(recipe)
    made_by = recipe.checkpoint_path / "recipe.yaml"
    text = made_by.read_text()
    assert "  state_dt_bias: true\n" in text
    made_by.write_text(text.replace("  state_dt_bias: true\n", ""))
    check_checkpoint(recipe)


def test_another_vocabulary_is_named(recipe: Recipe) -> None:
    save(recipe)
    larger = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, vocab_size=recipe.data.vocab_size + 128))
    rows = f"{recipe.padded_vocab_size} there, {larger.padded_vocab_size} here"
    with pytest.raises(UserError, match=rf"data.vocab_size.*{rows}"):
        check_checkpoint(larger)


def test_the_state_of_another_optimizer_is_not_taken(recipe: Recipe) -> None:
    save(recipe)
    other = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, name="muon"))
    with pytest.raises(UserError) as error:
        check_checkpoint(other)
    assert f"{recipe.checkpoint_path} holds the state of optimizer.name=adam, not of muon" in str(error.value)
    assert f"checkpoint.load_from={recipe.checkpoint_path}" in str(error.value)
    check_checkpoint(dataclasses.replace(other, megatron={"no_load_optim": True}))
    source = dataclasses.replace(other.checkpoint, directory="elsewhere", load_from=str(recipe.checkpoint_path))
    check_checkpoint(dataclasses.replace(other, checkpoint=source))


def test_a_run_that_neither_saves_nor_resumes_looks_at_no_checkpoint(recipe: Recipe) -> None:
    save(recipe)
    other = changed(recipe, state_size=6)
    check_checkpoint(dataclasses.replace(other, checkpoint=dataclasses.replace(other.checkpoint, save_interval=None)))


def test_load_from_must_hold_a_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    # Megatron would start from random weights without a word.
    source = dataclasses.replace(recipe.checkpoint, load_from=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"checkpoint.load_from=.*nothing holds no checkpoint"):
        check_checkpoint(dataclasses.replace(recipe, checkpoint=source))


def test_load_from_must_hold_the_same_model_but_may_have_a_shorter_context(recipe: Recipe, tmp_path: Path) -> None:
    # Megatron loads what fits, drops the rest and says nothing.
    save(recipe)
    here = dataclasses.replace(
        recipe.checkpoint, directory=str(tmp_path / "new"), load_from=str(recipe.checkpoint_path)
    )
    fresh = dataclasses.replace(recipe, checkpoint=here)
    check_checkpoint(changed(fresh, rotary_base=500_000))
    with pytest.raises(UserError, match=r"load_from=.* holds another model \(model.position_encoding: rope there, a_t"):
        check_checkpoint(changed(fresh, position_encoding="a_t"))


def test_prediction_depths_belong_to_the_model(recipe: Recipe, tmp_path: Path) -> None:
    with_depths = changed(recipe, layer_pattern=f"{recipe.layers}/*-")
    save(with_depths)
    with pytest.raises(UserError, match=r"layer_pattern: .*/\*- there, [^/]* here"):
        check_checkpoint(recipe)
    check_checkpoint(changed(with_depths, mtp_loss_scaling_factor=0.3))
    # A fresh run may do without them, but cannot start from a checkpoint that lacks its own.
    here = dataclasses.replace(
        recipe.checkpoint, directory=str(tmp_path / "new"), load_from=str(recipe.checkpoint_path)
    )
    for pattern in (recipe.layers, f"{recipe.layers}/*-"):
        check_checkpoint(changed(dataclasses.replace(recipe, checkpoint=here), layer_pattern=pattern))
    with pytest.raises(UserError, match=r"holds another model \(model.layer_pattern: .*/\*- there, .*/\*-/\*- here"):
        check_checkpoint(changed(dataclasses.replace(recipe, checkpoint=here), layer_pattern=f"{recipe.layers}/*-/*-"))


@pytest.mark.parametrize(("text", "step"), [("40", 40), ("0000\n", 0), ("release", 0)])
def test_saved_step(recipe: Recipe, text: str, step: int) -> None:
    assert saved_step(recipe.checkpoint_path) is None
    save(recipe, text)
    assert saved_step(recipe.checkpoint_path) == step


@pytest.mark.parametrize("text", ["", "forty", "4.5", "-1", None])
def test_a_run_goes_on_without_a_usable_tracker(recipe: Recipe, text: str | None, tmp_path: Path) -> None:
    # Megatron would print a line and end with exit code 0, or begin again and overwrite what is there.
    save(recipe)
    tracker = recipe.checkpoint_path / "latest_checkpointed_iteration.txt"
    tracker.unlink() if text is None else tracker.write_text(text)
    for step in (80, 10_000_000):
        whole(recipe.checkpoint_path / f"iter_{step:07d}")
    # Of a save that was cut off.
    (recipe.checkpoint_path / "iter_20000000").mkdir()
    check_checkpoint(recipe)
    assert find_newest(recipe.checkpoint_path).step == Step(10_000_000, recipe.checkpoint_path / "iter_10000000")
    assert saved_step(recipe.checkpoint_path) == (None if text is None else 10_000_000)
    [warning] = warnings(recipe)
    assert re.search(r"latest_checkpointed_iteration.txt.*; the run goes on from step 10000000$", warning)
    # As the source of other weights it has to be told.
    fields = [f"run_directory={tmp_path}/other", f"checkpoint.load_from={recipe.checkpoint_path}"]
    with pytest.raises(UserError, match=r"says .*; write the number|holds checkpoints \(40, 80, 10000000\), but not"):
        check_checkpoint(load_recipe("demo_cpu", fields))


def test_tasks_that_are_scored_must_be_there(recipe: Recipe, tmp_path: Path) -> None:
    scored = {"evaluation.tasks": ("piqa", str(tmp_path / "own.yaml")), "evaluation.data": str(tmp_path / "sets")}
    mock = changes.changed(recipe, {"data.corpus": None, "megatron.mock_data": True} | scored)
    check_files(mock)
    mock = changes.changed(mock, {"evaluation.interval": 1})
    with pytest.raises(UserError, match=r"evaluation.tasks: .*/own.yaml: no such file"):
        check_files(mock)
    (tmp_path / "own.yaml").touch()
    with pytest.raises(UserError, match=r"evaluation.data=.*/sets: no such folder; .* --tasks piqa` fills one"):
        check_files(mock)
    (tmp_path / "sets").mkdir()
    check_files(mock)


def test_folders_are_made(recipe: Recipe) -> None:
    make_run_directory(recipe)
    assert [path.name for path in recipe.run_path.iterdir()] == ["checkpoints"]
    assert list(recipe.checkpoint_path.iterdir()) == []


@pytest.mark.parametrize("field", ["run_directory", "checkpoint.directory"])
def test_a_file_in_the_way_is_named(recipe: Recipe, field: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=rf"{field}={path} cannot be written: Not a directory; state another {field}"):
        make_run_directory(load_recipe("demo_cpu", [f"run_directory={tmp_path}/run", f"{field}={path}"]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; run it as another user")
def test_a_folder_without_permission_is_named(recipe: Recipe, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        make_run_directory(recipe)


def test_a_finished_run_is_not_started_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_finished(recipe)
    save(recipe, str(recipe.train_iters - 1))
    assert not is_finished(recipe)
    finish(recipe)
    assert is_finished(recipe)
    # Evaluation alone takes no training samples.
    assert not is_finished(dataclasses.replace(recipe, megatron={"skip_train": True}))
    monkeypatch.setattr("megatron_txssm.training.processes.check_run", lambda recipe, world_size: None)
    assert launch(recipe, 2, ["--no-such-option"]) == 0
    assert f"demo_cpu: already finished; {recipe.checkpoint_path} holds step 320" in capsys.readouterr().out


def lose(folder: Path) -> None:
    shutil.rmtree(folder)


def lose_the_index(folder: Path) -> None:
    (folder / ".metadata").unlink()


def purge(folder: Path) -> None:
    """A scratch file system's cleaner removes files, not folders."""
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "why"),
    [(lose, "is not there"), (lose_the_index, r"has no index \(.metadata\)"), (purge, "holds no checkpoint")],
)
def test_a_run_goes_back_behind_a_damaged_checkpoint(
    recipe: Recipe, harm: Callable[[Path], None], why: str, tmp_path: Path
) -> None:
    save(recipe)
    whole(recipe.checkpoint_path / "iter_0000080")
    # Not asked for by the tracker: somebody has gone back behind it.
    whole(recipe.checkpoint_path / "iter_0000400")
    harm(finish(recipe))
    assert not is_finished(recipe)
    check_checkpoint(recipe)
    [warning] = warnings(recipe)
    back = r"the run goes on from step 80: 240 steps done again"
    assert re.fullmatch(rf"the checkpoint of step 320 is damaged \(.*iter_0000320 {why}\); {back}", warning)
    fields = [f"run_directory={tmp_path}/other", f"checkpoint.load_from={recipe.checkpoint_path}"]
    with pytest.raises(
        UserError, match=rf"load_from=.*step 320 is damaged .*{why}.*write another step .*\(40, 80, 400\)"
    ):
        check_checkpoint(load_recipe("demo_cpu", fields))


def test_of_all_ranks_one_looks_at_the_checkpoints(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Recipe] = []
    monkeypatch.setattr(preflight, "check_checkpoint", looked.append)
    for other in ("validate", "check_files", "check_room"):
        monkeypatch.setattr(preflight, other, lambda *_, **__: None)
    for rank in ("1", "0", "7"):
        monkeypatch.setenv("RANK", rank)
        check_run(recipe, world_size=2)
    assert looked == [recipe]


def test_a_run_does_not_begin_again_where_no_checkpoint_is_whole(recipe: Recipe) -> None:
    save(recipe)
    lose_the_index(whole(recipe.checkpoint_path / "iter_0000020"))
    lose_the_index(recipe.checkpoint_path / "iter_0000040")
    with pytest.raises(
        DamagedCheckpoint, match=r"step 40 is damaged .*step 20 is damaged .*no whole checkpoint is left"
    ):
        check_checkpoint(recipe)
    # What asks for information only gets it.
    assert saved_step(recipe.checkpoint_path) == 40
    assert list(warnings(recipe)) == []
    assert not is_finished(recipe)


def test_a_first_save_that_was_cut_off_is_none(recipe: Recipe) -> None:
    save(recipe)
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").unlink()
    (recipe.checkpoint_path / "iter_0000040" / "metadata.json").unlink()
    check_checkpoint(recipe)
    assert find_newest(recipe.checkpoint_path).step is None


def test_room_that_an_interrupted_save_holds_is_counted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    save(recipe)
    partial = recipe.checkpoint_path / "iter_0000060"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(bytes(1000))
    free = checkpoint_bytes(recipe) - 1000
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10 * free, free=free))
    check_room(recipe)
    (partial / "notes").touch()
    with pytest.raises(UserError, match="GB left"):
        check_room(recipe)


def test_room_for_a_checkpoint(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = checkpoint_bytes(recipe)
    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(total=10 * needed, free=free))
        if enough:
            check_room(recipe)
        else:
            with pytest.raises(UserError, match=r"has .* GB left, and a checkpoint of demo_cpu takes .*; make room"):
                check_room(recipe)
    check_room(dataclasses.replace(recipe, checkpoint=dataclasses.replace(recipe.checkpoint, save_interval=None)))


def test_other_data_than_the_checkpoints_are_named(recipe: Recipe) -> None:
    assert changed_data(recipe) == ""
    save(recipe)
    assert changed_data(recipe) == ""
    weights = {"python-library": 2.0}
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, weights=weights))
    assert changed_data(other) == f"data.weights: None there, {weights} here"
