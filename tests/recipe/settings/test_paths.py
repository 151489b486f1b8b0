"""Paths in recipes: `~` and variables; a run's own recipe survives moves and other current folders."""

import shutil
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.evaluate import evaluation_recipe
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.saving import keep_recipe

# One place of each kind: a top-level field, a section's field, a blend, a Megatron argument.
PLACES = ("run_directory", "checkpoint.directory", "data.cache_path", "data.train", "megatron.memory_snapshot_path")


def own_data(*more: str) -> list[str]:
    return ["data.train=data/train", "data.validation=data/validation", "data.tokenizer_model=b", *more]


def at(recipe: Recipe, place: str) -> str:
    section, _, name = place.rpartition(".")
    if section == "megatron":
        return recipe.megatron[name]
    value = getattr(getattr(recipe, section) if section else recipe, name)
    return value[0][1] if isinstance(value, tuple) else value


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("~", "/home/me"),
        ("~/a", "/home/me/a"),
        ("$SCRATCH/b", "/scratch/$disk/b"),
        ("x/${SCRATCH}y", "x//scratch/$disky"),
        ("a$$b", "a$b"),
        ("$(touch x)$", "$(touch x)$"),
        ("a~b", "a~b"),
    ],
)
def test_a_home_folder_and_variables_are_read_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, in_file: bool, written: str, wanted: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/$disk")
    if in_file:
        section, _, name = place.rpartition(".")
        text = f"{section}:\n  {name}: '{written}'\n" if section else f"{name}: '{written}'\n"
        file = tmp_path / "recipe.yaml"
        file.write_text(f"extends: demo_cpu\n{text}")
        recipe = load_recipe(file, ["data.validation=a", "data.tokenizer_model=b"] if place == "data.train" else [])
    else:
        recipe = load_recipe("demo_cpu", own_data(f"{place}='{written}'"))
    assert at(recipe, place) == wanted
    # Expanded once: a variable's value is not expanded again.
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("written", "wanted"),
    [("$UNSET_HERE/a", "contains $UNSET_HERE, which is not set"), ("~nobody-here/a", "begins with ~nobody-here")],
)
def test_what_has_no_value_is_refused(monkeypatch: pytest.MonkeyPatch, written: str, wanted: str) -> None:
    monkeypatch.delenv("UNSET_HERE", raising=False)
    for place in PLACES:
        with pytest.raises(UserError) as error:
            load_recipe("demo_cpu", own_data(f"{place}='{written}'"))
        assert str(error.value).startswith(f"--set {place}=") and wanted in str(error.value)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as training leaves it, started in home/ with relative paths; the current folder is another."""
    home = tmp_path / "home"
    for folder in ("data", "runs/r$1/data", "tokenizer"):
        (home / folder).mkdir(parents=True)
    monkeypatch.chdir(home)
    fields = ["run_directory=runs/r$$1", "data.validation=[[1, 'runs/r$$1/data/v'], [2, data/v]]"]
    fields += ["evaluation.tasks=[piqa, tasks/own.yaml]", "evaluation.data=data/$$sets"]
    recipe = load_recipe("demo_cpu", own_data(*fields, "data.tokenizer_model=tokenizer", "checkpoint.load_from=../x"))
    for folder in (recipe.run_path, recipe.checkpoint_path):
        keep_recipe(recipe, folder)
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text("5")
    (recipe.checkpoint_path / "iter_0000005").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home / "runs" / "r$1"


def test_a_runs_recipe_means_the_same_from_every_folder(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for file in (run / "recipe.yaml", run / "checkpoints" / "recipe.yaml"):
        recipe = load_recipe(file)
        assert recipe.run_path.resolve() == run and recipe.checkpoint_path.resolve() == run / "checkpoints"
        assert recipe.data.train == ((1.0, str(home / "data" / "train")),)
        assert [Path(prefix).resolve() for _, prefix in recipe.data.validation or ()] == [
            run / "data" / "v",
            home / "data" / "v",
        ]
        assert recipe.data.tokenizer_model == str(home / "tokenizer")
        assert recipe.checkpoint.load_from == str(tmp_path / "x")
        assert recipe.evaluation.tasks == ("piqa", str(home / "tasks" / "own.yaml"))
        assert recipe.evaluation.data == str(home / "data" / "$sets")
    evaluated = evaluation_recipe(run, [])
    assert evaluated.data.train == ((1.0, str(home / "data" / "train")),)
    assert Path(evaluated.checkpoint.load_from or "") == run / "checkpoints"


def test_a_run_that_was_moved_finds_its_own_files(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "archive" / "r2"
    moved.parent.mkdir()
    shutil.move(run, moved)
    for file in (moved / "recipe.yaml", moved / "checkpoints" / "recipe.yaml"):
        recipe = load_recipe(file)
        assert recipe.run_path.resolve() == moved and recipe.checkpoint_path.resolve() == moved / "checkpoints"
        assert [Path(prefix).resolve() for _, prefix in recipe.data.validation or ()] == [
            moved / "data" / "v",
            tmp_path / "home" / "data" / "v",
        ]


def test_a_name_on_the_hub_is_no_path(tmp_path: Path) -> None:
    recipe = load_recipe("demo_cpu", own_data("data.tokenizer_model=EleutherAI/gpt-neox-20b"))
    (tmp_path / "recipe.yaml").write_text(recipe.frozen(tmp_path))
    assert load_recipe(tmp_path / "recipe.yaml").data.tokenizer_model == "EleutherAI/gpt-neox-20b"
