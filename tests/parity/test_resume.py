"""A run that is killed and started again loses nothing: the same losses, bit for bit, at the same layout."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.parity.harness import write_tokens

TRAIN_ITERS, SAVE_INTERVAL = 8, 2

RECIPE = """
name: resume
run_directory: {run}
model:
  num_layers: 4
  layer_pattern: SSSA
  hidden_size: 32
  ffn_hidden_size: 64
  num_attention_heads: 2
  state_size: 16
  state_head_dim: 8
  state_num_groups: 2
  chunk_size: 16
parallel: {{use_distributed_optimizer: true}}
training:
  seq_length: 32
  global_batch_tokens: 128
  train_iters: {train_iters}
  precision: fp32
  transformer_impl: local
optimizer: {{learning_rate: 1e-3}}
data:
  blend: {data}
  split: 90,10,0
  tokenizer_type: NullTokenizer
  vocab_size: 64
  make_vocab_size_divisible_by: 16
checkpoint: {{save_interval: {save_interval}}}
logging: {{log_interval: 1, eval_iters: 0, tensorboard: false}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def start(run: Path, data: Path, *overrides: str) -> subprocess.Popen:
    """`txssm pretrain` of the recipe above in `run`, on two processes."""
    run.mkdir(exist_ok=True)
    recipe = run / "start.yaml"
    recipe.write_text(RECIPE.format(run=run, data=data, train_iters=TRAIN_ITERS, save_interval=SAVE_INTERVAL))
    words = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "megatron_txssm.cli", "pretrain", str(recipe), "--nproc", "2", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output


def losses(run: Path) -> dict[int, float]:
    """The loss of each step; where a step was repeated, the last."""
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return {line["iteration"]: line["lm loss"] for line in lines if "lm loss" in line}


def kill_after(step: int, process: subprocess.Popen, run: Path) -> None:
    """SIGKILL the launcher and its workers as soon as `step` is done."""
    deadline = time.monotonic() + 900
    while max(losses(run), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    launcher = psutil.Process(process.pid)
    for victim in [*launcher.children(recursive=True), launcher]:
        victim.kill()
    process.wait()


def latest_saved(run: Path) -> int:
    return int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    finish(start(run, data))
    assert set(losses(run)) == set(range(1, TRAIN_ITERS + 1))
    return run


def test_killed_and_resumed_twice_gives_the_same_losses_bit_for_bit(data, undisturbed, tmp_path):
    run = tmp_path / "killed"
    for step in (3, 5):
        kill_after(step, start(run, data), run)
        assert latest_saved(run) < TRAIN_ITERS
    finish(start(run, data))
    assert losses(run) == losses(undisturbed)
