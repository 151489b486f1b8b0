"""txssm bench throughput: real measurements of a tiny model; what it keeps, repeats, compares and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.bench import models, throughput, worker
from megatron_txssm.bench.inference import measure
from megatron_txssm.bench.models import DECODING, ENTRANTS, PREFILL, PRESETS, TRAINING, model_flops, recipe_of
from megatron_txssm.check.gpu import worker as check_worker
from megatron_txssm.cli.main import main
from megatron_txssm.files import alone_in
from megatron_txssm.recipe.changes import changed
from tests.bench.tiny import TINY, StandIn

SMALL = ("transxssm", "llama3", "mamba2", "jamba")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A command for a tiny preset."""
    monkeypatch.setitem(models.PRESETS, "tiny", TINY)
    return ["bench", "throughput", "--preset", "tiny", "--out", str(tmp_path)]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(StandIn, "began", [], raising=False)
    monkeypatch.setattr(StandIn, "fail", {}, raising=False)
    monkeypatch.setattr(throughput, "Child", StandIn)
    return StandIn


def measurements(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["measurements"]


def summary(folder: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    rows = json.loads((folder / "results.json").read_text())["summary"]
    return {(row["part"], row["length"], row["model"]): row for row in rows}


def test_training_is_measured(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny, "--parts", "training", "--models", "transxssm", "--lengths", "64", "--turns", "1"]) == 0
    [found] = measurements(tmp_path)
    assert found["tokens"] == 128 and len(found["seconds"]) == 2 and min(found["seconds"]) > 0
    assert found["peak_memory_bytes"] > 2**20
    assert "\n    64  transxssm  " in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "results.png"]


@pytest.mark.parametrize("materialised", [False, True])
def test_scores_are_materialised_in_training(materialised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_worker, "train", lambda task: {"fused": torch.backends.cuda.flash_sdp_enabled()})
    assert worker.train({"materialised": materialised}) == {"fused": not materialised}
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("model", ENTRANTS)
def test_inference_is_measured(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ENTRANTS[model].materialised:
        monkeypatch.delattr("torch.nn.functional.scaled_dot_product_attention")
    recipe = changed(recipe_of(ENTRANTS[model].architecture, TINY, 64), throughput.ON_CPU)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    task = {"recipe": str(file), "device": "cpu", "materialised": ENTRANTS[model].materialised, "steps": 2, "tokens": 3}
    found = measure(task | {"static_cache": ENTRANTS[model].static_cache, PREFILL: [64], DECODING: [32, 48]})
    assert found[PREFILL]["64"]["tokens"] == 64 and len(found[PREFILL]["64"]["seconds"]) == 2
    cached = [found[DECODING][context]["cache_bytes"] for context in ("32", "48")]
    if model == "mamba2":
        # Of eight layers: the state, and the last three inputs of the convolution of x, B and C.
        assert cached == 2 * [8 * 4 * (32 * 16 + (32 + 2 * 16) * 3)]
    else:
        assert cached[0] < cached[1]


def test_a_length_without_memory_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_txssm.bench import inference

    def decode(model: Any, length: int, task: dict[str, Any]) -> dict[str, Any]:
        if length == 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"tokens": 3}

    monkeypatch.setattr(inference, "_decode", decode)
    file = tmp_path / "recipe.yaml"
    file.write_text(changed(recipe_of("transxssm", TINY, 64), throughput.ON_CPU).to_yaml())
    task = {"recipe": str(file), "device": "cpu", "materialised": True, "static_cache": False, "steps": 1, "tokens": 3}
    found = measure(task | {PREFILL: [], DECODING: [32, 48]})
    assert found[DECODING]["32"] == {"tokens": 3}
    assert "CUDA out of memory" in found[DECODING]["48"]["error"]


def test_models_take_turns(tiny: list[str], stand_in: type[StandIn]) -> None:
    assert main([*tiny, "--models", "transxssm", "llama3", "llama3_static_cache"]) == 0
    inference = ["prefill-decoding-transxssm-128", "prefill-decoding-llama3-128", "decoding-llama3_static_cache-32"]
    trainings = [f"training-{model}-{length}" for length in (64, 128) for model in ("transxssm", "llama3")]
    assert stand_in.began == ["machine", *(f"{name}-turn{n}" for n in (1, 2) for name in [*trainings, *inference])]


def test_speed_ups_stand_beside_ratios_of_flops(tiny: list[str], tmp_path: Path, stand_in: type[StandIn]) -> None:
    assert main([*tiny, "--models", "transxssm", "llama3", "llama3_materialised", "llama3_static_cache"]) == 0
    found = summary(tmp_path)
    trained = found[TRAINING, 64, "llama3_materialised"]
    assert trained["tokens_per_second"] == 128 / 5 and trained["speedup"] == 2.5
    assert trained["speedup_turns"] == [2.5, 2.5]
    flops = [model_flops(recipe_of(name, TINY, 64), TRAINING, 64) for name in ("llama3", "transxssm")]
    assert trained["by_flops"] == flops[0] / flops[1] != 1
    assert found[DECODING, 32, "llama3_static_cache"]["by_bytes"] == 1
    assert found[TRAINING, 64, "transxssm"]["speedup"] is None


def test_an_interrupted_benchmark_continues(
    tiny: list[str], tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*tiny, "--models", "transxssm", "llama3", "--parts", "training", "--lengths", "64"]
    wait = stand_in.wait

    def interrupted(child: StandIn, deadline: float) -> dict[str, Any]:
        if child.name.startswith("training-llama3"):
            raise KeyboardInterrupt
        return wait(child, deadline)

    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "wait", interrupted)
        assert main(command) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    stand_in.began.clear()
    assert main(command) == 0
    assert stand_in.began == ["machine", "training-llama3-64-turn1", *(f"training-{m}-64-turn2" for m in SMALL[:2])]
    # More of it continues, too.
    stand_in.began.clear()
    assert main([*command, "--turns", "3"]) == 0
    assert stand_in.began == ["machine", *(f"training-{model}-64-turn3" for model in SMALL[:2])]


def test_a_full_disk_is_said(
    tiny: list[str],
    tmp_path: Path,
    stand_in: type[StandIn],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StandIn, "wait", full)
    assert main(tiny) == 2
    assert f"error: {tmp_path} cannot be used: No space left on device; make room" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_what_failed_is_said_and_tried_again(
    tiny: list[str], tmp_path: Path, stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*tiny, "--models", "transxssm", "llama3", "--turns", "1", "--lengths", "64"]
    stand_in.fail["training-llama3-64-turn1"] = {"error": "CUDA out of memory"}
    assert main(command) == 1
    assert "not measured: training llama3 64 turn 1: CUDA out of memory" in capsys.readouterr().out
    assert (tmp_path / "processes").is_dir()
    assert (TRAINING, 64, "llama3") not in summary(tmp_path)
    stand_in.fail.clear()
    stand_in.began.clear()
    assert main(command) == 0
    assert stand_in.began == ["machine", "training-llama3-64-turn1"]
    assert "not measured" not in capsys.readouterr().out.partition("tokens/s of a step")[2]


def test_scores_that_do_not_fit_are_not_tried(tiny: list[str], tmp_path: Path, stand_in: type[StandIn]) -> None:
    models = ["transxssm", "llama3_materialised"]
    assert main([*tiny, "--models", *models, "--parts", "training", "--lengths", "1000000", "--turns", "1"]) == 1
    assert stand_in.began == ["machine", "training-transxssm-1000000-turn1"]
    [failed] = [found for found in measurements(tmp_path) if "error" in found]
    assert failed["error"].startswith("attention's scores of 178814 GiB do not fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "4"], "was measured with settings.steps=2, now it is 4; these cannot be compared"),
        (["--machine"], "was measured with machine.cores="),
    ],
)
def test_other_settings_and_machines_are_not_mixed(
    tiny: list[str],
    stand_in: type[StandIn],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    command = [*tiny, "--models", "transxssm", "--parts", "training"]
    assert main(command) == 0
    if options == ["--machine"]:
        here = throughput.machine("cpu")
        monkeypatch.setattr(throughput, "machine", lambda device: here | {"cores": 96})
        options = []
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "7b"], "--preset 7b: use one of small, 320m, 1.3b"),
        (["--models", "llama3"], "--models llama3: add transxssm, with which all others are compared"),
        (["--models", "transxssm", "gpt"], "--models gpt: use some of transxssm, llama3"),
        (["--parts", "prefil"], "--parts prefil: use one of training, prefill, decoding"),
        (["--lengths", "4096", "8"], "--lengths 8 must be from 64 to"),
        (["--contexts", "0"], "--contexts 0 must be from 1 to"),
        (["--turns", "0"], "--turns 0 must be from 1 to"),
        (["--steps", "-1"], "--steps -1 must be from 1 to"),
        (["--cuda-graph"], "--cuda-graph needs a GPU, and none is visible here; leave it out"),
        (["--table"], "results.json is not there; measure first"),
        (["--out", "/dev/null/x"], "cannot be made: Not a directory; name another folder with --out"),
    ],
)
def test_nonsense_is_refused(
    options: list[str],
    message: str,
    stand_in: type[StandIn],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "throughput", *options]) == 2
    assert message in capsys.readouterr().err
    assert not stand_in.began and not list(tmp_path.rglob("results*"))


MEASURED = {"part": "prefill", "model": "llama3", "length": 64, "turn": 1, "tokens": 64, "seconds": [1.0, 2.0]}
MEASURED |= {"peak_memory_bytes": 5, "flops_per_token": 7.0}


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"error": "no memory", "seconds": None}, True),
        ({"model": "llama4"}, False),
        ({"turn": "1"}, False),
        ({"seconds": []}, False),
        ({"seconds": [1.0, 0.0]}, False),
        ({"tokens": None}, False),
        ({"part": "decoding"}, False),
    ],
)
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], valid: bool
) -> None:
    about = {"settings": {"preset": "small"}, "machine": {"device": "cpu"}}
    (tmp_path / "results.json").write_text(json.dumps(about | {"measurements": [MEASURED | changes]}))
    refused = "results.json is no result of this benchmark; remove it"
    assert main(["bench", "throughput", "--table", "--out", str(tmp_path)]) == (0 if valid else 2)
    assert (refused in capsys.readouterr().err) != valid
    (tmp_path / "results.json").write_text('{"study": "scaling"}')
    assert main(["bench", "throughput", "--table", "--out", str(tmp_path)]) == 2
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_models_of_a_preset_have_one_size_and_one_batch(preset: str) -> None:
    for length in PRESETS[preset].lengths:
        recipes = [recipe_of(name, PRESETS[preset], length) for name in SMALL]
        counts = [count_parameters(recipe.sizes).total for recipe in recipes]
        assert max(counts) < 1.02 * min(counts)
        [tokens] = {recipe.training.global_batch_tokens for recipe in recipes}
        assert tokens == PRESETS[preset].micro_batches * max(PRESETS[preset].micro_batch_tokens, length)


@pytest.mark.parametrize(("length", "ratio"), [(4096, 1.176), (16384, 1.704)])
def test_ratios_of_flops_are_those_of_the_recipes(length: int, ratio: float) -> None:
    ours, llama = (recipe_of(name, PRESETS["320m"], length) for name in ("transxssm", "llama3"))
    flops = [model_flops(recipe, TRAINING, length) for recipe in (llama, ours)]
    assert flops[0] / flops[1] == pytest.approx(ratio, abs=5e-4)
    # 2 per weight, less the logits of all but one token; then a quarter of what 4·length·H·K attention's scores are.
    prefill = model_flops(llama, PREFILL, length)
    assert flops[0] / 3 - prefill == pytest.approx(2 * 768 * 50277)
    decoding = model_flops(llama, DECODING, length) - flops[0] / 3
    assert decoding == pytest.approx(24 * 2 * length * 768)


def test_two_do_not_measure_at_once(
    tiny: list[str], tmp_path: Path, stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    with alone_in(tmp_path, "--out"):
        assert main(tiny) == 2
    assert "another process writes into" in capsys.readouterr().err
    assert not stand_in.began
