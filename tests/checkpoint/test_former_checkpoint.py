"""Runs of versions that built Megatron's GPTModel: former_run/run.tar.xz, made by former_run/make."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megatron_txssm.checkpoint.saved_model import open_checkpoint

ARCHIVE = Path(__file__).parent / "former_run" / "run.tar.xz"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def steps(run: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: (line["lm loss"], line["grad_norm"]) for line in lines}


def test_a_former_run_continues_with_its_optimizer_state(run: Path):
    before = steps(run)
    (run / "metrics.jsonl").unlink()
    words = ["pretrain", str(run / "recipe.yaml"), "--nproc", "2"]
    done = subprocess.run([sys.executable, "-m", "megatron_txssm.cli", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
