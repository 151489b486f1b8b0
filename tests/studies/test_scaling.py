"""The study of scaling: models of equal size on equally many tokens per parameter, and the fitted laws."""

import json
import math
from pathlib import Path

import pytest

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.paper import LAYERS
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.studies.scaling import TOKENS_PER_PARAMETER, Law, check_sizes, show, variants
from megatron_txssm.studies.study import begin, runs_of
from megatron_txssm.studies.summary import VariantResult

UNSAVED: Changes = {"checkpoint.save_interval": None, "data.corpus": None, "megatron.mock_data": True}
SIZES = {"small": ("d64", "d96", "d128"), "paper": ("320m", "1.3b")}


def models(preset: str) -> dict[str, Recipe]:
    return variants(preset, [], TOKENS_PER_PARAMETER[preset])


@pytest.mark.parametrize("preset", SIZES)
def test_architectures_of_a_size_are_comparable_and_sizes_have_equal_tokens(preset: str) -> None:
    found = models(preset)
    assert list(found) == [f"{name}_{size}" for size in SIZES[preset] for name in LAYERS]
    check_sizes([*found.values()])
    for name, recipe in found.items():
        tokens = recipe.train_iters * recipe.training.global_batch_tokens
        assert tokens / count_parameters(recipe.sizes).total == pytest.approx(TOKENS_PER_PARAMETER[preset], rel=0.02)
        architecture = name.rpartition("_")[0]
        assert recipe.layers == LAYERS[architecture][: len(recipe.layers)]
        assert recipe.model.state_gated is (architecture in ("mamba2", "jamba"))


def test_unequal_sizes_and_lengths_are_refused() -> None:
    found = models("small")
    longer = {name: changed(recipe, {"training.train_tokens": 10**6}) for name, recipe in found.items()}
    with pytest.raises(UserError, match=r"tokens per parameter, .* state --tokens-per-parameter and no length"):
        check_sizes([*longer.values()])
    wider = changed(found["jamba_d64"], {"model.ffn_hidden_size": 256})
    with pytest.raises(UserError, match="more than 2% apart"):
        check_sizes([*found.values(), wider])
    with pytest.raises(UserError, match=r"the runs differ in optimizer.learning_rate"):
        check_sizes([*found.values(), changed(found["jamba_d64"], {"optimizer.learning_rate": 1.0})])


def results(points: dict[int, list[float]]) -> list[VariantResult]:
    return [VariantResult("", size, dict(enumerate(losses)), []) for size, losses in points.items()]


def test_a_law_is_found_again() -> None:
    law = Law.through(results({size: [3 * size**-0.1] for size in (1000, 5000, 70_000)}))
    assert law is not None and (law.coefficient, law.exponent) == pytest.approx((3, 0.1))
    assert law.error == pytest.approx(0, abs=1e-6)


def test_the_seeds_give_a_law_its_uncertainty() -> None:
    law = Law.through(results({1000: [2.0, 2.2], 10_000: [1.0, 1.1]}))
    # By hand: residuals of log 1.1 / 2 at each of four points, two degrees of freedom, spread (log 10)².
    squares, spread = 4 * (math.log(1.1) / 2) ** 2, math.log(10) ** 2
    assert law is not None and law.exponent == pytest.approx(math.log10(2))
    assert law.error == pytest.approx(math.sqrt(squares / 2 / spread))
    assert Law.through(results({1000: [2.0, 2.2]})) is None and Law.through([]) is None


def test_what_is_finished_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {
        name: changed(recipe, {"training.train_tokens": 4096, **UNSAVED}) for name, recipe in models("small").items()
    }
    begin(tmp_path, short, [1], {"study": "scaling", "command": "txssm study scaling"}, None)
    for run in runs_of(tmp_path):
        lines = [{"iteration": 1, "grad_norm": 1.0, "step_seconds": 1.0}]
        lines.append({"iteration": 1, "validation lm loss": 10 * count_parameters(run.recipe.sizes).total ** -0.1})
        if run.path.name != "jamba_d128-seed1":
            (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    show(tmp_path)
    said = capsys.readouterr().out
    assert "transxssm: loss = 10.000 * parameters ** -0.1000 ± 0.0000" in said and "1 runs are not finished" in said
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["laws"]["jamba"]["exponent"] == pytest.approx(0.1) and found["command"] == "txssm study scaling"
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_no_tokens_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for tokens in ("0", "nan", "inf"):
        assert main(["study", "scaling", "--tokens-per-parameter", tokens]) == 2
        assert "must be above 0, and at most 1,000,000" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main(["study", "scaling", "--tokens-per-parameter", "1e-9"]) == 2
    assert "--tokens-per-parameter 1e-09 gives transxssm_d64 0 tokens, less than a step" in capsys.readouterr().err
