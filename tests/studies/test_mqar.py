"""The study of associative recall: comparable models, the curves, and who is ahead."""

import json
from pathlib import Path

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.studies.mqar import REFERENCE, RIVAL, mqar, show, variants, verdict
from megatron_txssm.studies.study import begin, runs_of
from tests.support.tiny_run import sets

UNSAVED: Changes = {"checkpoint.save_interval": None, "training.train_iters": 2}
# Of 2, 4, 8 and 16 pairs; the seeds of TransXSSM differ by 0.1.
SHARES = {
    REFERENCE: [1.0, 0.9, 0.5, 0.2],
    "state_space_rope": [0.5] * 4,
    RIVAL: [1.0, 0.8, 0.7, 0.2],
    "attention_rope": [1.0] * 4,
}


def test_the_four_architectures_are_comparable() -> None:
    found = mqar().variants
    mqar().check([*found.values()])
    layers = {name: recipe.layers for name, recipe in found.items()}
    mixers = {name: set(text) - {"-"} for name, text in layers.items()}
    assert mixers == {
        REFERENCE: {"M", "*"},
        "state_space_rope": {"M"},
        RIVAL: {"M"},
        "attention_rope": {"*"},
    }
    assert len({len(text) for text in layers.values()}) == 1
    assert {name for name, recipe in found.items() if recipe.model.position_encoding == "conv1d_d"} == {RIVAL}
    longer = changed(found[RIVAL], {"data.recall_pairs": (2,)})
    with pytest.raises(UserError, match=r"the runs differ in data.recall_pairs"):
        mqar().check([found[REFERENCE], longer])


def test_the_users_layers_and_samples_are_those_of_all() -> None:
    found = variants(["model.layer_pattern=M-*-", "data.recall_pairs=[3]"])
    assert [recipe.layers for recipe in found.values()] == ["M-*-", "M-M-", "M-M-", "*-*-"]
    assert {recipe.data.recall_pairs for recipe in found.values()} == {(3,)}


def test_a_study_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other_data = ["data.recall_pairs=null", "megatron.mock_data=true", "logging.eval_iters=1"]
    for fields, said in (
        (["logging.eval_iters=0"], "logging.eval_iters=0 leaves out the validations, which a study compares"),
        (other_data, "data.recall_pairs=null leaves nothing to recall"),
    ):
        assert main(["study", "mqar", "--out", str(tmp_path / "study"), *sets(fields)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_what_is_finished_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = {name: changed(recipe, UNSAVED) for name, recipe in variants(["data.recall_pairs=[2, 4, 8, 16]"]).items()}
    begin(tmp_path, recipes, [1, 2], {"study": "mqar", "command": "txssm study mqar"}, None)
    for run in runs_of(tmp_path):
        steps = [{"iteration": step, "grad_norm": 1.0, "step_seconds": 1.0} for step in (1, 2)]
        lines: list[dict[str, float]] = [*steps[:1], validation([0.0] * 4, 1), *steps[1:]]
        lines.append(validation([share + 0.05 * (run.number - 1) for share in SHARES[run.variant]], 2))
        if run.path.name != "attention_rope-seed2":
            (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show(tmp_path)
    said = capsys.readouterr().out
    assert "0.525 ± 0.035" in said and "1 runs are not finished" in said
    row = next(line for line in said.splitlines() if line.lstrip().startswith("any value"))
    assert row.split()[-4:] == ["0.500", "0.250", "0.125", "0.062"]
    assert "transxssm is ahead of mamba2 at 4 pairs; behind mamba2 at 8 pairs; not told apart from" in said
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["variants"][RIVAL]["accuracy"]["8"]["mean"] == pytest.approx(0.725)
    assert found["variants"]["attention_rope"]["accuracy"]["4"]["by_seed"] == {"1": 1.0}
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def validation(shares: list[float], step: int) -> dict[str, float]:
    sets = zip((2, 4, 8, 16), shares, strict=True)
    found = {f"validation-{pairs}_pairs": share for pairs, share in sets}
    return {"iteration": step} | {f"{name} {kind}": found[name] for name in found for kind in ("lm loss", "accuracy")}


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({1: 0.9, 2: 0.8}, {1: 0.5, 2: 0.6}, "ahead of mamba2 at 4 pairs"),
        ({1: 0.5, 2: 0.6}, {1: 0.9, 2: 0.8}, "behind mamba2 at 4 pairs"),
        # Differences of 0.4 and -0.2.
        ({1: 0.9, 2: 0.4}, {1: 0.5, 2: 0.6}, "not told apart from mamba2 at 4 pairs"),
        # One seed in common.
        ({1: 0.9, 2: 0.8}, {1: 0.5, 3: 0.6}, "not told apart from mamba2 at 4 pairs"),
        ({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0}, "not told apart from mamba2 at 4 pairs"),
    ],
)
def test_who_is_ahead(ours: dict[int, float], theirs: dict[int, float], said: str) -> None:
    assert verdict([4], {4: ours}, {4: theirs}) == f"transxssm is {said}"
