"""A study with a real training, from its recipes to its results."""

import json
from functools import partial
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.paper import Measured
from megatron_txssm.reporting.series import read_series
from megatron_txssm.studies.conduct import Study, conduct
from megatron_txssm.studies.study import check_comparable, runs_of
from megatron_txssm.studies.summary import show_comparison
from tests.support.recipes import TINY
from tests.support.tiny_run import make_tiny_run


def test_a_study_trains_its_models_and_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    short = ["training.train_iters=3", "checkpoint.save_interval=2"]
    models = {"hybrid": load_recipe(make_tiny_run(tmp_path / "data").recipe, short)}
    study = Study(
        name="one model",
        folder=tmp_path / "study",
        variants=models,
        check=partial(check_comparable, varied=()),
        show=lambda folder: show_comparison(folder, list(models), "hybrid", {"hybrid": Measured(8.0, 7.0)}),
        facts={},
    )
    assert conduct(study, seeds=1, timing_rounds=0) == 0
    found = json.loads((study.folder / "results.json").read_text())
    assert found["unfinished_runs"] == 0 and found["environment"][0]["megatron-core"]
    (run,) = runs_of(study.folder)
    # Three steps, one validation after the last, before its save.
    series = read_series(run.path)
    assert list(series.step) == [1, 2, 3] and list(series.validation["validation"].step) == [3]
    assert found["variants"]["hybrid"]["loss_by_seed"] == {"1": series.validation["validation"].loss[-1]}
    capsys.readouterr()
    assert conduct(study, seeds=1, timing_rounds=0) == 0
    assert "1 of 1 runs are finished, 0 steps to go" in capsys.readouterr().out


def test_a_full_disk_and_a_closed_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run would write its output; nothing is trained."""
    recipe = changed(TINY, {"megatron.mock_data": True, "checkpoint.save_interval": None, "logging.eval_iters": 1})
    study = Study("s", tmp_path / "study", {"one": recipe}, lambda _: None, print, {})
    (tmp_path / "study" / "runs" / "one-seed1").mkdir(parents=True)
    (tmp_path / "study" / "runs" / "one-seed1" / "logs").touch()
    with pytest.raises(UserError, match=r"study cannot be used: File exists; make room, and repeat the command"):
        conduct(study, seeds=1, timing_rounds=0)

    def closed(*_: object, **options: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("megatron_txssm.studies.conduct.train", closed)
    with pytest.raises(BrokenPipeError):
        conduct(study, seeds=1, timing_rounds=0)
