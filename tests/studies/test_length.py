"""txssm eval length: its evaluations, the remedies of each model, and its table; nothing is evaluated."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.studies import length
from tests.support.recipes import TINY

REMEDIES = ["as trained", "C scaled by its position", "positions interpolated"]


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[str], dict[str, Any]]]:
    """The fields and options of each evaluation, whose loss by position is its number and that of the part."""
    found: list[tuple[Sequence[str], dict[str, Any]]] = []

    def evaluate(run: Path, *, output: Path, overrides: Sequence[str], by_position: int, **options: Any) -> int:
        found.append((overrides, options))
        losses = [len(found) + part / 10 for part in range(by_position)]
        sets = {
            "small": {"tokens": 1, "by_position": losses},
            "large": {"tokens": 3, "by_position": [loss + 4 for loss in losses]},
        }
        output.mkdir(parents=True)
        (output / "validation.json").write_text(json.dumps({"sets": sets}))
        return 0

    monkeypatch.setattr(length, "evaluate", evaluate)
    monkeypatch.setattr(length, "evaluation_recipe", lambda run, overrides: TINY)
    return found


def test_each_remedy_is_evaluated(
    tmp_path: Path, evaluations: list[tuple[Sequence[str], dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    trained, batch = TINY.training.seq_length, TINY.training.global_batch_tokens
    long = 3 * trained
    assert main(["eval", "length", str(tmp_path), "--seq-length", str(long), "--parts", "6", "--step", "7"]) == 0
    common = [f"training.seq_length={long}", f"training.global_batch_tokens={max(1, batch // long) * long}"]
    common += ["training.micro_batch_size=1", "parallel.context_parallel_size=1"]
    scaled, interpolated = (
        [f"model.length_scaling_base={trained}"],
        ["model.rope_scaling=linear", "model.rotary_interpolation_factor=3"],
    )
    assert [fields for fields, _ in evaluations] == [common, scaled + common, interpolated + common]
    assert all(options["step"] == 7 for _, options in evaluations)

    folder = tmp_path / "evaluation" / f"length_{long}"
    found = json.loads((folder / "length.json").read_text())
    assert list(found["loss"]) == REMEDIES and found["trained_length"] == trained
    # Weighted by tokens: three quarters of it are 4 higher.
    assert found["loss"]["as trained"] == pytest.approx([4 + part / 10 for part in range(6)])
    assert found["starts"] == [part * long // 6 for part in range(6)]
    assert (folder / "length.png").stat().st_size > 5000
    lines = capsys.readouterr().out.splitlines()
    beyond = [line for line in lines if "beyond training" in line]
    assert len(beyond) == 4 and beyond[0].split() == [str(trained), "beyond", "training", "4.2000", "5.2000", "6.2000"]


def test_the_remedies_are_those_that_concern_a_model() -> None:
    for name, wanted in (
        ("llama3_320m", [REMEDIES[0], REMEDIES[2]]),
        # No layer rotates.
        ("jamba_320m", REMEDIES[:2]),
        ("mamba2_320m", REMEDIES[:2]),
    ):
        assert list(length.remedies(load_recipe(name), 8192)) == wanted
    trained_so = changed(
        TINY, {"model.length_scaling_base": 8, "model.rope_scaling": "linear", "model.rotary_interpolation_factor": 2}
    )
    assert list(length.remedies(trained_so, 1 << 20)) == REMEDIES[:1]
    # 4096 · 2.5: the factor is whole.
    [*_, words] = length.remedies(load_recipe("llama3_320m"), 10240).values()
    assert words[-1] == "model.rotary_interpolation_factor=3"


def test_a_length_within_the_trainings_is_refused(
    tmp_path: Path, evaluations: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "length", str(tmp_path), "--seq-length", str(TINY.training.seq_length)]) == 2
    assert "is no more than the training's" in capsys.readouterr().err and not evaluations


@pytest.mark.parametrize("parts", ["0", "-1", "7", "1000000000"])
def test_parts_that_do_not_divide_the_length(
    tmp_path: Path, evaluations: list[Any], capsys: pytest.CaptureFixture[str], parts: str
) -> None:
    assert main(["eval", "length", str(tmp_path), "--parts", parts]) == 2
    assert f"--parts {parts} does not divide --seq-length 128" in capsys.readouterr().err and not evaluations


def test_workers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(length, "is_worker", lambda: True)
    assert main(["eval", "length", str(tmp_path)]) == 2
    assert "without srun or torchrun" in capsys.readouterr().err
