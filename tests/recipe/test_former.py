"""Recipes of versions with layers S and A, counted by model.num_layers: kept ones are translated, others answered."""

from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.former import translated
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.schema import SECTIONS

RULE = "unknown key 'model.num_layers'; it follows from model.layer_pattern, which has one symbol per layer: "


def complete(model: dict[str, Any], training: dict[str, Any] | None = None) -> dict[str, Any]:
    """A recipe with all sections, as runs keep it."""
    return {name: {} for name in SECTIONS} | {"model": model, "training": training or {}}


@pytest.mark.parametrize(
    ("letters", "num_layers", "pattern"),
    [
        ("SA", 4, "M-*-M-*-"),
        ("S", 1, "M-"),
        ("A", 3, "*-*-*-"),
        ("SSSSSSSA", 16, "M-M-M-M-M-M-M-*-" * 2),
    ],
)
def test_a_kept_recipe_is_translated(letters: str, num_layers: int, pattern: str) -> None:
    kept = complete({"num_layers": num_layers, "layer_pattern": letters, "hidden_size": 8}, {"seq_length": 4})
    assert translated(kept) == complete({"layer_pattern": pattern, "hidden_size": 8}, {"seq_length": 4})


def test_without_a_pattern_it_had_the_papers() -> None:
    assert translated(complete({"num_layers": 8})) == complete({"layer_pattern": "M-M-M-M-M-M-M-*-"})


def test_layers_in_bf16_were_pairs() -> None:
    kept = complete({"num_layers": 1, "layer_pattern": "S"}, {"first_last_layers_bf16": 3})
    assert translated(kept)["training"] == {"first_last_layers_bf16": 6}


@pytest.mark.parametrize(
    ("switches", "holds"),
    [
        ({"override_opt_param_scheduler": True}, {"schedule_at_resume": "recipe"}),
        ({"override_opt_param_scheduler": False}, {}),
        ({"use_checkpoint_opt_param_scheduler": True}, {}),
    ],
)
def test_switches_of_the_schedule_were_megatrons(switches: dict[str, bool], holds: dict[str, str]) -> None:
    kept = complete({"layer_pattern": "M-*-"}) | {"optimizer": {"learning_rate": 1}, "megatron": {"manual_gc": True}}
    with_switches = kept | {"megatron": kept["megatron"] | switches}
    assert translated(with_switches) == kept | {"optimizer": kept["optimizer"] | holds}


@pytest.mark.parametrize(
    "data",
    [
        # Of this version.
        complete({"layer_pattern": "M-*-"}, {"first_last_layers_bf16": 2}),
        # A mixture of both.
        complete({"layer_pattern": "M-*-", "num_layers": 2}),
        complete({"layer_pattern": "SA", "num_layers": None}),
        complete({"layer_pattern": "SA", "num_layers": 10**9}),
        complete({"layer_pattern": ["SA"], "num_layers": 2}),
        # A user's, which extends another.
        {"extends": "demo_cpu", "model": {"layer_pattern": "SA", "num_layers": 2}},
        complete({}) | {"model": None},
        complete({"layer_pattern": "SA", "num_layers": 2}) | {"training": None},
    ],
)
def test_anything_else_stays_as_it_is(data: dict[str, Any]) -> None:
    assert translated(data) is data


@pytest.mark.parametrize(
    ("name", "overrides", "wanted"),
    [
        ("demo_cpu", ["model.layer_pattern=SA", "model.num_layers=4"], "write only model.layer_pattern='M-*-M-*-'"),
        ("demo_cpu", ["model.num_layers=4", "model.layer_pattern='SA'"], "write only model.layer_pattern='M-*-M-*-'"),
        ("llama3_320m", ["model.num_layers=2"], "write only model.layer_pattern='*-*-'"),
        ("transxssm_320m", ["model.num_layers=16"], f"write only model.layer_pattern='{'M-M-M-M-M-M-M-*-' * 2}'"),
        ("demo_cpu", ["model.layer_pattern=M-*-", "model.num_layers=4"], "remove model.num_layers"),
        ("demo_cpu", ["model.num_layers=many"], "write one such as M-M-M-M-M-M-M-*-"),
        ("demo_cpu", ["model.layer_pattern=SA", "model.num_layers=0"], "write one such as M-M-M-M-M-M-M-*-"),
    ],
)
def test_num_layers_on_the_command_line_is_answered_with_the_pattern(
    name: str, overrides: list[str], wanted: str
) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(name, overrides)
    (option,) = (text for text in overrides if "num_layers" in text)
    assert str(error.value) == f"--set {option}: {RULE}{wanted}"


def test_a_recipe_whose_layers_are_no_blocks_has_no_translation(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo_cpu\nmodel: {layer_pattern: MM*-}\n")
    with pytest.raises(UserError, match="write one such as M-M-M-M-M-M-M-"):
        load_recipe(path, ["model.num_layers=4"])


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("{layer_pattern: SA, num_layers: 4}", f"{RULE}write only model.layer_pattern='M-*-M-*-'"),
        ("{num_layers: 4, layer_pattern: SA}", f"{RULE}write only model.layer_pattern='M-*-M-*-'"),
        ("{layer_pattern: M-*-, num_layers: 4}", f"{RULE}remove model.num_layers"),
        # The recipe that it extends may have any pattern.
        ("{num_layers: 4}", f"{RULE}write one such as M-M-M-M-M-M-M-*-"),
        (
            "{layer_pattern: SA}",
            "layer_pattern='SA': S and A are now M and *, each with its FFN as a layer of its own (-): "
            "write M-*- once for each repetition",
        ),
    ],
)
def test_a_users_recipe_is_answered_with_file_line_and_translation(tmp_path: Path, model: str, wanted: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: demo_cpu\nmodel: {model}\n")
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert str(error.value) == f"{path}, line 2: {wanted}"


def test_a_pattern_on_the_command_line_is_refused_by_its_option() -> None:
    with pytest.raises(UserError) as error:
        load_recipe("demo_cpu", ["model.layer_pattern=SA"])
    assert str(error.value).startswith("--set model.layer_pattern=SA: layer_pattern='SA': S and A are now M and *")
