"""The demo, shortened to a few steps: it runs to the end, and a second run reuses the first one's data."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm.demo.demo import start_afresh
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe


@pytest.mark.slow
def test_the_demo_runs_from_text_to_text(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_txssm.cli", "demo", "--set", "training.train_iters=4"]
    command += ["--set", "logging.log_interval=1", "--set", "logging.eval_interval=10"]
    command += ["--set", "logging.eval_iters=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    steps = [line.split()[1] for line in lines if line.startswith("iteration ") and "/4" in line]
    assert steps == ["1/4", "2/4", "3/4", "4/4"], "each step once: stopped after the second, resumed with the third"
    losses = {name: float(value) for line in lines if "  " in line for name, value in _loss(line)}
    # After four steps the model barely beats a uniform guess (ln 1024 = 6.93); the n-grams know the text.
    assert losses["interpolated bigram"] < losses["unigram"] < losses["TransXSSM"] < 7
    run = tmp_path / "runs" / "demo"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert "def read_file(path):" in done.stdout and "tokens/s" in lines[-1]


def _loss(line: str) -> list[tuple[str, str]]:
    """(model, nats) of a line of the table of losses; nothing for other lines."""
    return [
        (name, line.strip().removeprefix(name).split()[0])
        for name in ("TransXSSM", "interpolated bigram", "unigram")
        if line.strip().startswith(name + "  ")
    ]


def test_the_demo_removes_no_run_but_its_own(tmp_path: Path) -> None:
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}"])
    recipe.checkpoint_path.mkdir()
    other = load_recipe("transxssm_320m").to_yaml()
    (recipe.checkpoint_path / "recipe.yaml").write_text(other)
    with pytest.raises(UserError, match="holds another run's checkpoints; use another run_directory"):
        start_afresh(recipe)
    assert (recipe.checkpoint_path / "recipe.yaml").read_text() == other
