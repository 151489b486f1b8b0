"""txssm eval states: several checkpoints side by side; nothing is evaluated."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.studies import states
from tests.support.recipes import write_recipe

NORMS = [2.0**position for position in range(8)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each measurement; of four layers, the n-th has n times NORMS, and the last is infinite at 256."""
    found: list[dict[str, Any]] = []

    def evaluate_states(run: Path, output: Path, **options: Any) -> int:
        found.append(options)
        layers = [{"layer": n, "surviving_share": n / 10, "mean": [n * x for x in NORMS]} for n in (1, 2, 3, 4)]
        layers = [layer | {"largest": [9 * x for x in layer["mean"]]} for layer in layers]
        layers[-1]["largest"] = [1.0] * 7 + [None]
        output.mkdir(parents=True)
        positions = [*range(32, 257, 32)]
        (output / "states.json").write_text(json.dumps({"step": 7, "positions": positions, "layers": layers}))
        return 0

    monkeypatch.setattr(states, "evaluate_states", evaluate_states)
    return found


def make_run(folder: Path) -> Path:
    """A folder that looks like a run with a checkpoint."""
    (folder / "checkpoints" / "iter_0000007").mkdir(parents=True)
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("7")
    write_recipe(folder / "checkpoints" / "recipe.yaml", {"megatron.mock_data": True}, run=folder)
    return folder


def test_checkpoints_stand_side_by_side(
    tmp_path: Path, measured: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(tmp_path / place / "mine")) for place in ("a", "b")]
    assert main(["eval", "states", *runs, "--every", "32", "--length", "256", "--output", str(tmp_path / "out")]) == 0
    assert [options["length"] for options in measured] == [256, 256] and measured[0]["every"] == 32
    found = json.loads((tmp_path / "out" / "states.json").read_text())
    assert list(found["checkpoints"]) == ["mine", "mine_2"] and found["checkpoints"]["mine"]["trained_length"] == 32
    assert (tmp_path / "out" / "states.png").stat().st_size > 5000
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("mine ")]
    # Layers 1 and 2 at 32, 64, 128 and 256 tokens: 1.5 times 1, 2, 8 and 128; at most 9 times 2 times 128.
    assert rows[0] == ["mine", "1", "-", "2", "1.5", "3", "12", "192", "2.3e+03", "0.150"]
    assert [row[1:4] for row in rows] == [["1", "-", "2"], ["3", "-", "3"], ["4", "-", "4"]]
    assert rows[2][-3:-1] == ["not", "finite"]


def test_one_run_has_its_results_in_its_own_folder(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    run = make_run(tmp_path / "mine")
    assert main(["eval", "states", str(run)]) == 0
    # Four times the training's length.
    assert measured[0]["length"] == 128 and (run / "evaluation" / "states_128" / "states.json").is_file()


def test_no_length_is_not_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "states", str(make_run(tmp_path / "mine")), "--length", "0"]) == 2
    assert "--length 0 must be from 1 to" in capsys.readouterr().err


def test_several_need_a_folder_and_no_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(tmp_path / name)) for name in ("a", "b")]
    assert main(["eval", "states", *runs]) == 2
    assert "state --output FOLDER" in capsys.readouterr().err
    monkeypatch.setattr(states, "is_worker", lambda: True)
    assert main(["eval", "states", *runs]) == 2
    assert "without srun or torchrun" in capsys.readouterr().err
