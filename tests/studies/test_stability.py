"""The study of stability: its variants, divergence as a result, what it measures and shows; nothing is trained."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm import files
from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.studies import conduct, stability, trainings
from megatron_txssm.studies.study import StudyRun, begin, check_comparable, runs_of
from megatron_txssm.studies.trainings import train
from megatron_txssm.training.launch.ended import note_local_end
from tests.support.recipes import TINY

NAN = "rank 0 failed (exit code 1): FloatingPointError: the loss or a gradient of step 5 is NaN or infinite"
VARIED = ("model.layer_pattern", "model.ablation")


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_the_variants_are_comparable(preset: str) -> None:
    found = stability.variants(preset, [])
    check_comparable([*found.values()], VARIED)
    assert list(found) == list(stability.VARIANTS)
    ablations = {name: recipe.model.ablation for name, recipe in found.items()}
    assert ablations == {"as_paper": None, "no_residual": "no_residual", "no_norm": "no_norm", "no_ffn": None}
    assert "-" in found["as_paper"].layers and "-" not in found["no_ffn"].layers
    # As many attention layers, and state-space layers for the rest.
    assert found["no_ffn"].layers.count("*") == found["as_paper"].layers.count("*") == 1
    assert {recipe.training.transformer_impl for recipe in found.values()} == {"local"}


def test_state_space_layers_replace_ffns_where_those_were() -> None:
    # Of 8 state-space layers and an FFN of the parameters of one and a half.
    mixer = count_parameters(changed(TINY, {"model.layer_pattern": "M"}).sizes).state_space
    width = 2 * round(1.5 * mixer / (6 * TINY.model.hidden_size))
    fields = ["model.layer_pattern=M-M-*-M-", f"model.ffn_hidden_size={width}"]
    fields += [f"model.{name}={getattr(TINY.model, name)}" for name in ("hidden_size", "state_size", "state_head_dim")]
    found = stability.variants("small", [*fields, "model.num_attention_heads=2", "model.state_num_groups=2"])
    assert found["no_ffn"].layers == "MMMMM*MMMM"


@pytest.mark.parametrize("pattern", ["MM*", "*-*-"])
def test_the_hybrid_must_have_what_is_left_out(pattern: str) -> None:
    with pytest.raises(UserError, match=r"needs state-space layers \(M\) and FFNs \(-\)"):
        stability.variants("small", [f"model.layer_pattern={pattern}"])


def recipes() -> dict[str, Recipe]:
    changes: Changes = {"megatron.mock_data": True, "checkpoint.save_interval": None, "training.train_iters": 40}
    changes |= {"logging.eval_iters": 1}
    return dict.fromkeys(stability.VARIANTS, changed(TINY, changes))


def trained(run: StudyRun, steps: int, *, spike: int | None = None) -> None:
    lines: list[dict[str, Any]] = [
        {"iteration": step, "lm loss": 50.0 if step == spike else 3 - step / 100, "grad_norm": 1.0}
        for step in range(1, steps + 1)
    ]
    if steps == run.recipe.train_iters:
        lines.append({"iteration": steps, "validation lm loss": 2.0 + run.number / 10})
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds: without norms the first diverges; without residual connections there is a spike at step 30."""
    begin(tmp_path, recipes(), [1, 2], {"study": "stability", "command": ""}, None)
    for run in runs_of(tmp_path):
        diverges = run.path.name == "no_norm-seed1"
        trained(run, 4 if diverges else 40, spike=30 if run.variant == "no_residual" else None)
        note_local_end(run.path, *((1, NAN) if diverges else (0, "its processes ended without an error")))
    return tmp_path


def test_divergence_is_a_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainings, "PRETRAIN", ("false",))
    (lost,) = [run for run in runs_of(folder) if run.has_diverged]
    assert lost.path.name == "no_norm-seed1"
    # Otherwise it would be trained once more.
    assert train("stability", runs_of(folder), may_diverge=True) == []
    assert main(["study", "stability", "--table", "--out", str(folder)]) == 0
    found = json.loads((folder / "results.json").read_text())
    assert found["unfinished_runs"] == 0 and (folder / "results.png").stat().st_size > 5000
    runs = {name: variant["runs"] for name, variant in found["variants"].items()}
    assert (runs["no_norm"]["1"]["diverged"], runs["no_norm"]["1"]["steps"]) == (True, 4)
    assert found["variants"]["no_norm"]["loss_by_seed"] == {"2": 2.2}
    assert [runs[name]["2"]["spikes"] for name in stability.VARIANTS] == [0, 1, 0, 0]
    out = capsys.readouterr().out.partition("loss: of")[0].splitlines()
    assert max(map(len, out)) <= 80
    as_paper, no_norm = ([line for line in out if line.startswith(name)] for name in ("as_paper", "no_norm"))
    assert "1 of 2" in no_norm[0] and "0 of 2" in as_paper[0] and "2.1500 ± 0.0707" in as_paper[0]
    assert as_paper[1].split() == ["as_paper", "1", "±", "0", "1"]


@pytest.mark.parametrize(
    ("content", "command", "said"),
    [
        (None, "mqar", "holds a study of stability; name another folder with --out"),
        (None, "stability", "results.json cannot be written: No space left on device; make room"),
        ("[]", "stability", "study.json is damaged; remove it, and repeat the study's command"),
        ('{"study": "stab', "stability", "study.json is damaged"),
    ],
)
def test_what_is_wrong_with_the_folder_is_said(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    command: str,
    said: str,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if content is not None:
        (folder / "study.json").write_text(content)
    monkeypatch.setattr(files, "write_file_atomically", full)
    assert main(["study", command, "--table", "--out", str(folder)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        {"length": 64, "every": 32, "checkpoints": {}},
        {"step": 40, "positions": [16, 64], "layers": [{"mean": [1, 2], "largest": [1, 2]}]},
        {"step": 40, "positions": [32, 64], "layers": [{"mean": [1, 2], "largest": [1]}]},
        [],
    ],
)
def test_states_of_something_else_are_none(folder: Path, content: Any) -> None:
    run, *_ = runs_of(folder)
    (run.path / "evaluation/states").mkdir(parents=True)
    (run.path / "evaluation/states/states.json").write_text(json.dumps(content))
    assert stability.Course.of(run).states is None


def test_a_kill_leaves_no_half_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "flush", kill)
        begin(tmp_path, recipes(), [1], {"study": "stability"}, None)
    assert not [*tmp_path.glob("runs/*/recipe.yaml")]
    begin(tmp_path, recipes(), [1], {"study": "stability"}, None)


def test_a_loss_beyond_all_perplexities(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "_plot", lambda *_: None)
    run, *_ = runs_of(folder)
    with (run.path / "metrics.jsonl").open("a") as lines:
        lines.write('{"iteration": 40, "validation lm loss": 1000.0}\n')
    stability.show(folder)
    found = json.loads((folder / "results.json").read_text())["variants"][run.variant]
    assert found["loss_by_seed"]["1"] == 1000 and found["perplexity"] == {"mean": None, "deviation": None}


def test_other_failures_are_none(folder: Path) -> None:
    (run,) = [run for run in runs_of(folder) if run.path.name == "no_norm-seed1"]
    note_local_end(run.path, 1, "rank 0 failed (exit code 1): OSError: [Errno 28] No space left on device")
    assert not run.has_diverged
    # Another result on the same GPU: that GPU is at fault.
    note_local_end(run.path, 1, f"{NAN}; computed again on the same GPU, it came out differently")
    assert not run.has_diverged


def test_diverged_runs_are_not_queued_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[Path] = []
    monkeypatch.setattr(conduct, "submit", lambda recipe, **_: queued.append(recipe) or 0)
    study = conduct.Study("stability", folder, recipes(), lambda _: None, print, {}, may_diverge=True)
    assert conduct.submit_study(study, seeds=2, nodes=1) == 0 and queued == []


def test_a_signal_while_states_are_measured_ends_the_study(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stability, "saved_step", lambda _: 40)
    for code, ends in ((130, True), (143, True), (1, False)):
        monkeypatch.setattr(stability, "evaluate_states", lambda *_, code=code, **options: code)
        with pytest.raises(SystemExit) if ends else nullcontext():
            stability.measure_states(runs_of(folder)[0])
        assert ("the same command continues" in capsys.readouterr().out) == ends


def test_states_are_measured_once_for_each_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Path, dict[str, Any]]] = []
    step: dict[str, int | None] = {"saved": None}

    def evaluate_states(run: Path, output: Path, **options: Any) -> int:
        measured.append((run, options))
        output.mkdir(parents=True, exist_ok=True)
        layers = [{"layer": 1, "mean": [1.0, 2.0], "largest": [3.0, None], "surviving_share": 0.5}]
        found = {"step": step["saved"], "positions": [32, 64], "layers": layers}
        (output / "states.json").write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(stability, "evaluate_states", evaluate_states)
    monkeypatch.setattr(stability, "saved_step", lambda _: step["saved"])
    run, *_ = runs_of(folder)
    stability.measure_states(run)
    assert not measured, "there is no checkpoint yet"
    for saved in (20, 20, 40):
        step["saved"] = saved
        stability.measure_states(run)
    assert [options for _, options in measured] == [{"length": 64, "samples": 4, "every": 32}] * 2
    stability.show(folder)
    found = json.loads((folder / "results.json").read_text())["variants"][run.variant]["runs"]["1"]["states"]
    assert found == {"step": 40, "positions": [32, 64], "mean": [1.0, 2.0], "largest": [3.0, None]}
