"""A study's folder, and which comparisons are refused; nothing is trained."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import Changes, changed, differences
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.paper import TABLE_2, TABLE_2_SIZES
from megatron_txssm.studies import conduct, study
from megatron_txssm.studies.position_encoding import position_encoding, variants
from megatron_txssm.studies.study import begin, begin_timing, check_comparable, runs_of
from tests.support.recipes import TINY

VARIED = ("model.layer_pattern",)
CHECK = partial(check_comparable, varied=VARIED)
FACTS: Any = {"study": "of layers", "command": "txssm study"}


def two_variants(*both: Changes, **one: Any) -> dict[str, Any]:
    """A hybrid and an attention model of one size, with changes `both`; `one`: the attention model's own."""
    base = changed(TINY, {"megatron.mock_data": True} | {k: v for part in both for k, v in part.items()})
    attention = {"model.layer_pattern": "*-*-"} | {name.replace("__", "."): value for name, value in one.items()}
    return {"hybrid": base, "attention": changed(base, attention)}


def test_a_study_has_a_run_of_each_variant_with_each_seed(tmp_path: Path) -> None:
    begin(tmp_path, two_variants(), [1, 2], FACTS, CHECK)
    found = runs_of(tmp_path)
    names = ["attention-seed1", "hybrid-seed1", "attention-seed2", "hybrid-seed2"]
    assert [run.path.name for run in found] == names, "every variant once before a second seed"
    assert [run.recipe.training.seed for run in found] == [1, 1, 2, 2]
    but = ("name", "run_directory", "training.seed", *VARIED, "megatron.mock_data", "logging.eval_interval")
    assert differences([TINY, *(run.recipe for run in found)], but=but) == {}
    assert study.study_facts(tmp_path) == FACTS | {"data_sha256": None}


@pytest.mark.parametrize(("interval", "wanted"), [(None, 20), (5, 5), (6, 20)])
def test_the_last_step_is_validated_before_it_is_saved(tmp_path: Path, interval: int | None, wanted: int) -> None:
    begin(tmp_path, two_variants({"logging.eval_interval": interval}), [1], FACTS, CHECK)
    assert {run.recipe.logging.eval_interval for run in runs_of(tmp_path)} == {wanted}


def test_a_study_is_begun_again_with_more_seeds_but_not_with_other_fields(tmp_path: Path) -> None:
    begin(tmp_path, two_variants(), [1], FACTS, CHECK)
    begin(tmp_path, two_variants(), [1, 2], FACTS | {"command": "later"}, CHECK)
    assert len(runs_of(tmp_path)) == 4 and study.study_facts(tmp_path)["command"] == "txssm study"
    longer = two_variants({"training.train_iters": 21})
    with pytest.raises(UserError, match=r"begun with training.train_iters=20, now it is 21; repeat its command"):
        begin(tmp_path, longer, [1], FACTS, CHECK)
    # Also if only new seeds have them.
    with pytest.raises(UserError, match=r"the runs differ in training.train_iters \(20, 21\)"):
        begin(tmp_path, longer, [3], FACTS, CHECK)
    with pytest.raises(UserError, match="holds a study of of layers"):
        begin(tmp_path, two_variants(), [1], FACTS | {"study": "of sizes"}, CHECK)
    assert len(runs_of(tmp_path)) == 4


def test_other_data_in_the_same_place_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "data_digest", lambda recipe: "before")
    begin(tmp_path, two_variants(), [1], FACTS, CHECK)
    monkeypatch.setattr(study, "data_digest", lambda recipe: "after")
    with pytest.raises(UserError, match="begun with other training data"):
        begin(tmp_path, two_variants(), [1, 2], FACTS, CHECK)
    begin(tmp_path, two_variants(), [1, 2], FACTS, None)


def test_unequal_sizes_are_refused(tmp_path: Path) -> None:
    # TINY has few parameters, of which these FFNs are 0.9% or 4%.
    sizes = {width: two_variants(model__ffn_hidden_size=width) for width in (65, 68)}
    counts = {
        width: [count_parameters(recipe.sizes).total for recipe in both.values()] for width, both in sizes.items()
    }
    assert max(counts[65]) <= 1.02 * min(counts[65]) and max(counts[68]) > 1.02 * min(counts[68])
    fields = (*VARIED, "model.ffn_hidden_size")
    check_comparable([*sizes[65].values()], fields)
    with pytest.raises(UserError, match="more than 2% apart; choose sizes that agree, or accept it with --allow-uneq"):
        begin(tmp_path, sizes[68], [1], FACTS, partial(check_comparable, varied=fields))
    assert not (tmp_path / "runs").exists()
    begin(tmp_path, sizes[68], [1], FACTS, None)
    assert len(runs_of(tmp_path)) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("optimizer__learning_rate", 2e-3), ("training__train_iters", 19), ("data__train", ((1.0, "other"),))],
)
def test_variants_that_train_otherwise_are_refused(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"the runs differ in {field.replace('__', '.')}"):
        begin(tmp_path, two_variants(**{field: value}), [1], FACTS, CHECK)


def test_timing_runs_save_and_validate_nothing(tmp_path: Path) -> None:
    begin(tmp_path, two_variants({"checkpoint.save_interval": 5}), [1, 2], FACTS, CHECK)
    found = begin_timing(tmp_path, 2)
    names = ["attention-round1", "hybrid-round1", "attention-round2", "hybrid-round2"]
    assert [run.path.name for run in found] == names, "the variants in turn"
    for run in found:
        assert run.recipe.train_iters == study.TIMING_STEPS and run.recipe.checkpoint.save_interval is None
        assert run.recipe.logging.eval_iters == 0 and run.path.parent == tmp_path / "timing"
    assert len(runs_of(tmp_path)) == 4


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_the_seven_models_of_table_2_are_comparable(preset: str) -> None:
    found = variants(preset, [])
    assert list(found) == list(TABLE_2)
    check_comparable([*found.values()], ("model.layer_pattern", "model.position_encoding"))
    mixers = {name: (recipe.blocks, recipe.model.position_encoding) for name, recipe in found.items()}
    assert mixers == {
        "attention_rope": ("*" * 8, "rope"),
        **{f"state_space_{encoding}": ("M" * 8, encoding) for encoding in ("conv1d_d", "a_t", "rope")},
        **{f"hybrid_{encoding}": ("MMMMMMM*", encoding) for encoding in ("conv1d_d", "a_t", "rope")},
    }
    model = found["hybrid_conv1d_d"].model
    # Rotated attention in every hybrid, and no gate: the encoding of the state-space layers alone differs.
    assert (model.attention_position_encoding, model.state_gated) == ("rope", False)


def test_the_papers_preset_has_table_2s_sizes_and_schedule() -> None:
    recipe = load_recipe("position_encoding_paper")
    assert differences([recipe, changed(recipe, TABLE_2_SIZES)]) == {}
    training = load_recipe("transxssm_320m").optimizer
    assert recipe.optimizer == training


def test_the_small_preset_is_no_toy() -> None:
    recipe = load_recipe("position_encoding_small")
    assert recipe.model.hidden_size >= 128 and recipe.training.seq_length >= 2048


def test_a_hybrid_without_attention_is_no_hybrid(tmp_path: Path) -> None:
    overrides = ["model.layer_pattern=M-M-"]
    with pytest.raises(UserError, match="needs attention"):
        position_encoding("paper", folder=tmp_path, overrides=overrides)


def test_a_job_is_queued_for_each_run_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queued: list[tuple[str, dict[str, Any]]] = []

    def submit(recipe: Path, *, check: object, **allocation: Any) -> int:
        queued.append((str(recipe.relative_to(tmp_path)), allocation))
        return 0

    monkeypatch.setattr(conduct, "submit", submit)
    models = two_variants({"checkpoint.save_interval": None, "logging.eval_iters": 1})
    of_layers = conduct.Study("of layers", tmp_path, models, CHECK, print, {})
    begin(tmp_path, models, [1], {"study": "of layers"}, CHECK)
    (tmp_path / "runs" / "hybrid-seed1" / "metrics.jsonl").write_text('{"iteration": 20, "grad_norm": 1.0}\n')
    assert conduct.submit_study(of_layers, seeds=1, nodes=2, nproc_per_node=1) == 0
    assert queued == [("runs/attention-seed1/recipe.yaml", {"nodes": 2, "nproc_per_node": 1})]
    assert "hybrid-seed1: finished" in capsys.readouterr().out
