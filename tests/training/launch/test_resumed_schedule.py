"""Whether a run may resume under another schedule, and what it is told."""

import dataclasses
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.training.launch.preflight import check_checkpoint, warnings

SAVED = 40


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of a run with two checkpoints."""
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}/run"])
    for step in (20, SAVED):
        folder = recipe.checkpoint_path / f"iter_{step:07d}"
        folder.mkdir(parents=True)
        for name in (".metadata", "metadata.json"):
            (folder / name).write_text("{}")
    (recipe.checkpoint_path / "recipe.yaml").write_text(recipe.to_yaml())
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    return recipe


def asked(recipe: Recipe) -> Recipe:
    return changed(recipe, {"optimizer.schedule_at_resume": "recipe"})


CHANGES = {
    "training.train_iters": (320, 400),
    "optimizer.learning_rate": (0.004, 0.5),
    "optimizer.decay_style": ("cosine", "linear"),
    "optimizer.wsd_decay_shape": ("exponential", "linear"),
    "optimizer.adam_beta2": (0.95, 0.5),
    "optimizer.muon_momentum": (0.95, 0.5),
    "megatron.lr_decay_iters": (None, 100),
    "megatron.lr_warmup_init": (None, 1e-4),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_is_named_with_both_values_and_the_remedies(recipe: Recipe, field: str) -> None:
    old, new = CHANGES[field]
    other = changed(recipe, {field: new})
    with pytest.raises(UserError) as error:
        check_checkpoint(other)
    message = str(error.value)
    assert f"({field}: {old} there, {new} here)" in message
    assert f"set optimizer.schedule_at_resume=recipe to continue from step {SAVED} under this one" in message
    check_checkpoint(asked(other))
    assert list(warnings(asked(other))) == [
        f"from step {SAVED + 1} on, this run has another schedule than before ({field}: {old} there, {new} here)"
    ]
    # The other remedy.
    [kept] = [word.strip("()") for word in message.split() if word.endswith("recipe.yaml)")]
    check_checkpoint(load_recipe(kept))


def test_the_field_alone_changes_nothing(recipe: Recipe) -> None:
    check_checkpoint(asked(recipe))
    assert list(warnings(asked(recipe))) == []


@pytest.mark.parametrize(
    ("length", "stated"),
    [
        ({"train_iters": 30}, "training.train_iters=30"),
        ({"train_iters": None, "train_tokens": 30 * 2048 - 1}, "training.train_tokens=61439 (30 steps)"),
    ],
)
def test_a_training_that_ends_before_its_checkpoint(recipe: Recipe, length: Changes, stated: str) -> None:
    shorter = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **length))
    tracker = recipe.checkpoint_path / "latest_checkpointed_iteration.txt"
    for other in (shorter, asked(shorter)):
        with pytest.raises(UserError) as error:
            check_checkpoint(other)
        assert str(error.value) == (
            f"{stated} ends before step {SAVED + 1}, the first after the checkpoint "
            f"{recipe.checkpoint_path}/iter_0000040; train longer, or go back to 20: echo STEP > {tracker}"
        )
    # Evaluation alone takes no step.
    check_checkpoint(changed(shorter, {"megatron.skip_train": True}))
    tracker.write_text("20")
    check_checkpoint(asked(shorter))


def test_a_second_warm_up_is_announced(recipe: Recipe) -> None:
    longer = changed(asked(recipe), {"training.train_iters": 10 * SAVED + 10})
    _, warning = warnings(longer)
    assert warning.startswith("step 41 is within the warm-up of the new schedule, which takes 41 steps")
    assert len(list(warnings(changed(longer, {"optimizer.warmup_fraction": 0.05})))) == 1
    assert len(list(warnings(changed(longer, {"megatron.lr_decay_iters": 300})))) == 1


@pytest.fixture
def branch(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A run in another folder, which continues the first."""
    step = recipe.checkpoint_path / f"iter_{SAVED:07d}"
    return load_recipe("demo_cpu", [f"run_directory={tmp_path}/branch", f"checkpoint.branch_from={step}"])


def test_a_branch_is_checked_like_a_resume(recipe: Recipe, branch: Recipe) -> None:
    check_checkpoint(branch)
    assert list(warnings(branch)) == []
    other = changed(branch, {"optimizer.learning_rate": 0.5, "training.seed": 1})
    with pytest.raises(UserError, match=r"learning_rate: 0.004 there, 0.5 here.*schedule_at_resume=recipe"):
        check_checkpoint(other)
    check_checkpoint(asked(other))
    schedule, data = warnings(asked(other))
    assert "from step 41 on" in schedule and "different data" in data
    with pytest.raises(UserError, match=r"another model .*state_size: 64 there, 32 here\); state that run's values"):
        check_checkpoint(changed(branch, {"model.state_size": 32}))
    # A run's own folder may be removed, the other run's must not.
    with pytest.raises(UserError, match=r"another model .*; use another run_directory .* or remove it"):
        check_checkpoint(changed(recipe, {"model.state_size": 32}))


@pytest.mark.parametrize("steps", [30, SAVED])
def test_a_branch_that_is_over_at_its_start(branch: Recipe, steps: int) -> None:
    with pytest.raises(UserError, match=r"ends before step 41, .*train longer, or set .*branch_from to iter_0000020$"):
        check_checkpoint(changed(branch, {"training.train_iters": steps}))


def test_a_branch_goes_on_from_its_own_checkpoint(recipe: Recipe, branch: Recipe) -> None:
    branch.checkpoint_path.parent.mkdir()
    recipe.checkpoint_path.rename(branch.checkpoint_path)
    # The other run may be gone by then.
    check_checkpoint(branch)


def test_what_a_branch_may_start_from(recipe: Recipe, branch: Recipe) -> None:
    folder = recipe.checkpoint_path
    for path, why in {
        folder: "is not a step of a run, such as",
        folder / "iter_x": "is not a step of a run, such as",
        folder
        / "iter_0000030": r"step 30 is damaged \(.* is not there\); .*another step \(iter_0000020, iter_0000040\)",
    }.items():
        with pytest.raises(UserError, match=rf"checkpoint.branch_from={path}.*{why}"):
            check_checkpoint(changed(branch, {"checkpoint.branch_from": str(path)}))
    with pytest.raises(UserError, match="exclude each other"):
        validate(changed(branch, {"checkpoint.load_from": str(folder)}))
