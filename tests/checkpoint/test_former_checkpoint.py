"""Runs of versions that built Megatron's GPTModel: former_run/run.tar.xz, made by former_run/make."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.cli.main import main
from megatron_txssm.data.corpus.shard import write_shard
from megatron_txssm.recipe.loader import load_recipe
from tests.support.tiny_run import sets, txssm

ARCHIVE = Path(__file__).parent / "former_run" / "run.tar.xz"
# What the version that made the run exports: the names and bytes of all tensors.
EXPORTED = "5386b4176f97c4fd64e18e0802683545e0d33720f964fe83c0d5dc7448d81e18"
# Its loss on `documents`, in nats per token.
LOSS = 4.171680221557617


def documents() -> list[list[int]]:
    return [[(7 * number + 3 * position) % 63 for position in range(40)] for number in range(20)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def steps(run: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: (line["lm loss"], line["grad_norm"]) for line in lines if "lm loss" in line}


@pytest.mark.parametrize("by", ["its kept recipe", "a recipe in today's terms"])
def test_a_former_run_continues_with_its_optimizer_state(run: Path, by: str):
    before, recipe = steps(run), run / "recipe.yaml"
    assert "layer_pattern: SA\n" in recipe.read_text()
    (run / "metrics.jsonl").unlink()
    if by == "a recipe in today's terms":
        text = load_recipe(recipe).to_yaml()
        assert "layer_pattern: M-*-\n" in text and "num_layers" not in text
        recipe = run.parent / "mine.yaml"
        recipe.write_text(text)
    done = txssm("pretrain", str(recipe), "--nproc", "2")
    assert done.code == 0, done.stderr
    after = steps(run)
    assert after.keys() == {5, 6, 7, 8}
    # On the processor that made it, bit for bit; others round bf16 sums otherwise. Without Adam's moments, step 6 and
    # later differ by more than 0.001.
    for step, values in after.items():
        assert values == pytest.approx(before[step], rel=2e-4)


def test_a_former_checkpoints_weights_are_found_by_present_names(run: Path):
    saved = open_checkpoint(run)
    assert saved.recipe.layers == "M-*-"
    names = ["decoder.layers.0.mixer.in_proj.weight.x", "decoder.layers.3.mlp.linear_fc2.weight"]
    assert saved.read(names).keys() == set(names)


def test_a_former_checkpoint_exports_as_it_did(run: Path, tmp_path: Path):
    assert main(["convert", "export", str(run), str(tmp_path / "out"), "--no-verify"]) == 0
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(tmp_path / "out/model.safetensors").items()):
        digest.update(name.encode() + bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    assert digest.hexdigest() == EXPORTED


def test_a_former_checkpoint_evaluates_as_it_did(run: Path):
    data = run.parent / "data"
    write_shard(documents(), data, 64, 63)
    fields = (f"data.train={data}", f"data.validation={data}", "megatron.mock_data=null")
    done = txssm("eval", "loss", str(run), *sets(fields))
    assert done.code == 0, done.stderr
    (found,) = json.loads((run / "evaluation/validation.json").read_text())["sets"].values()
    # As above.
    assert found["loss"] == pytest.approx(LOSS, rel=2e-4)
