"""A run that is killed and started again loses nothing: the same losses, bit for bit, at the same layout."""

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.parity.harness import write_tokens
from tests.support.recipes import FOUR_LAYERS, tokens_of, write_recipe
from tests.support.tiny_run import command, sets

TRAIN_ITERS, SAVE_INTERVAL = 8, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def start(run: Path, data: Path, *overrides: str) -> subprocess.Popen:
    """`txssm pretrain` of a tiny recipe in `run`, on two processes."""
    run.mkdir(exist_ok=True)
    changes = {"training.train_iters": TRAIN_ITERS, "checkpoint.save_interval": SAVE_INTERVAL}
    recipe = write_recipe(run / "start.yaml", FOUR_LAYERS, tokens_of(data), changes, run=run)
    words = command("pretrain", str(recipe), "--nproc", "2", *sets(overrides))
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
