"""Whether a run may resume under another schedule, and what it is told."""

import dataclasses
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
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
    [kept] = [word for word in message.split() if word.endswith("recipe.yaml")]
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
            f"{stated} ends before step {SAVED}, which {recipe.checkpoint_path} holds; train longer, or go back to 20: "
            f"echo STEP > {tracker}"
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
