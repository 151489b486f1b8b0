"""A run with multi-token prediction as a user has it: stopped, resumed, evaluated, used without its depths."""

import json
from pathlib import Path

import pytest

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.recipe.loader import load_recipe
from tests.support.tiny_run import Done, TinyRun, make_tiny_run, sets, txssm

pytestmark = pytest.mark.slow

FIELDS = ("model.layer_pattern=M-*-/*-M/*-M", "training.train_iters=6", "checkpoint.save_interval=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Stopped after three of six steps, and resumed."""
    made = make_tiny_run(tmp_path_factory.mktemp("prediction"))
    _succeeds(made.pretrain(fields=[*FIELDS, "megatron.exit_interval=3"]))
    _succeeds(made.pretrain(fields=FIELDS))
    return made


def _succeeds(done: Done) -> str:
    assert done.code == 0, done.stdout + done.stderr
    return done.stdout


def _losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line["lm loss"] for line in lines if "lm loss" in line}


def test_it_goes_on_bit_for_bit(run: TinyRun) -> None:
    through = run.folder / "through"
    _succeeds(txssm("pretrain", str(run.recipe), *sets([*FIELDS, f"run_directory={through}"])))
    assert _losses(through) == _losses(run.run) and len(_losses(through)) == 6


def test_conversions_leave_the_depths_out_and_say_so(run: TinyRun) -> None:
    exported, imported = run.folder / "exported", run.folder / "imported"
    said = _succeeds(txssm("convert", "export", str(run.run), str(exported)))
    assert "left out: multi-token prediction, 2 depths" in said
    assert load_recipe(exported / "recipe.yaml").prediction_depths == []
    _succeeds(txssm("convert", "import", str(exported), str(imported)))
    ours, back = open_checkpoint(run.run), open_checkpoint(imported)
    assert ours.prediction_depths == 2 and back.prediction_depths == 0
    weights, again = ours.read(ours.shapes), back.read(back.shapes)
    assert weights.keys() == again.keys() and all(weights[name].equal(again[name]) for name in weights)
    assert not any(name.startswith("mtp.") for name in weights)


def test_the_model_writes_without_its_depths(run: TinyRun) -> None:
    words = ("--prompt", "1 2 3", "--max-new-tokens", "4", "--temperature", "0")
    said = _succeeds(txssm("generate", str(run.run), *words)).splitlines()
    [text] = [line for line in said if line.startswith("1 2 3 ")]
    assert len(text.split()) == 7


def test_the_evaluated_loss_is_the_models_own(run: TinyRun) -> None:
    losses = []
    for fields in ([], ["model.layer_pattern=M-*-"]):
        _succeeds(txssm("eval", "loss", str(run.run), *sets(fields)))
        found = json.loads((run.run / "evaluation" / "validation.json").read_text())
        assert found["step"] == 6
        losses += [of_set["loss"] for of_set in found["sets"].values()]
    assert len(losses) == 2 and losses[0] == losses[1]
