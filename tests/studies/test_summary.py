"""The numbers of a study: means and spreads over seeds, paired differences, steps per second; nothing is trained."""

import json
import math
from pathlib import Path

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.paper import TABLE_2, Measured
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.studies.study import StudyRun, begin, begin_timing, runs_of
from megatron_txssm.studies.summary import Spread, show_comparison, summarize
from tests.support.recipes import TINY

PAPER = {"one": Measured(8.0, 7.0), "two": Measured(9.0, 6.0)}
LOSSES = {"one": {1: 2.0, 2: 2.2}, "two": {1: 2.1, 2: 2.5}}


def recipe(**more: object) -> Recipe:
    changes: Changes = {"megatron.mock_data": True, "checkpoint.save_interval": None}
    return changed(TINY, changes | more)


def trained(run: StudyRun, loss: float, seconds: float) -> None:
    """A finished run: its first steps take ten times as long, its first validation has a higher loss."""
    steps = run.recipe.train_iters
    lines: list[dict[str, object]] = [{"iteration": 0, "start": {}, "environment": {"torch": "1.0"}}]
    for step in range(1, steps + 1):
        lines.append({"iteration": step, "grad_norm": 1.0, "step_seconds": seconds * (10 if step <= 2 else 1)})
        if step in (steps // 2, steps):
            lines.append({"iteration": step, "validation lm loss": loss if step == steps else 9.0})
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of two variants and two seeds, all trained."""
    begin(tmp_path, {"one": recipe(), "two": recipe()}, [1, 2], {"study": "of two", "command": "txssm study"}, None)
    for run in runs_of(tmp_path):
        trained(run, LOSSES[run.variant][run.number], 0.5 if run.variant == "one" else 0.25)
    return tmp_path


def test_perplexity_is_the_mean_over_the_seeds(folder: Path) -> None:
    one, two = summarize(folder, ["one", "two"]).results
    assert one.losses == LOSSES["one"] and two.losses == LOSSES["two"]
    assert one.perplexity.mean == pytest.approx((math.exp(2.0) + math.exp(2.2)) / 2)
    # Of two values, the sample standard deviation is their distance by the root of 2.
    assert one.perplexity.deviation == pytest.approx((math.exp(2.2) - math.exp(2.0)) / math.sqrt(2))
    # By seed 0.1 and 0.3.
    assert two.behind(one) == pytest.approx((0.2, 0.2 / math.sqrt(2)))
    assert one.steps_per_second == pytest.approx([2, 2]) and two.steps_per_second == pytest.approx([4, 4])


def test_steps_timed_apart_replace_those_of_the_trainings(folder: Path) -> None:
    for run in begin_timing(folder, 1):
        trained(run, 0.0, 0.1)
    summary = summarize(folder, ["one", "two"])
    assert summary.timed_apart and [result.steps_per_second for result in summary.results] == [
        pytest.approx([10]),
        pytest.approx([10]),
    ]


def test_the_results_say_how_they_were_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(folder, ["one", "two"], "one", PAPER)
    found = json.loads((folder / "results.json").read_text())
    assert (found["study"], found["command"], found["unfinished_runs"]) == ("of two", "txssm study", 0)
    assert found["environment"] == [{"torch": "1.0"}]
    assert found["variants"]["two"]["loss_by_seed"] == {"1": 2.1, "2": 2.5}
    assert found["variants"]["two"]["paper"] == {"perplexity": 9.0, "steps_per_second": 6.0}
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "8.207 ± 1.157" in said and "+0.2000 ± 0.1414" in said
    assert "may have shared the machine" in said and "not finished" not in said


def test_what_is_not_finished_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = [run for run in runs_of(folder) if run.path.name == "two-seed2"]
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    (run.path / "metrics.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    show_comparison(folder, ["one", "two"], "one", PAPER)
    said = capsys.readouterr().out
    assert "1 runs are not finished: means over different seeds cannot be compared yet" in said
    assert summarize(folder, ["one", "two"]).results[1].losses == {1: 2.1}


def test_one_value_has_no_spread_and_none_no_mean() -> None:
    assert Spread.of([2.0]).text(".1f") == "2.0" and math.isnan(Spread.of([2.0]).deviation)
    assert Spread.of([]).text(".1f") == ""


def test_a_table_of_a_study_that_has_just_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, dict.fromkeys(TABLE_2, recipe()), [1], {"study": "position-encoding", "command": ""}, None)
    assert main(["study", "position-encoding", "--table", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in TABLE_2) and "7 runs are not finished" in said
    assert main(["study", "position-encoding", "--table", "--out", str(tmp_path / "none")]) == 2
    assert "holds no study" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--seeds", "0"],
        ["--parallel", "0"],
        ["--rounds", "-1"],
        ["--submit"],
        # Without --submit: else it would train here.
        ["--dry-run", "--seeds", "0"],
        ["--nodes", "2", "--seeds", "0"],
    ],
)
def test_wrong_options(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", "position-encoding", *words]) == 2
    assert words[0] in capsys.readouterr().err and not list(tmp_path.iterdir())
