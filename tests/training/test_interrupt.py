"""Ctrl-C during training saves and stops; the same command goes on from there."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support.tiny_run import ENVIRONMENT, Done, TinyRun, command, sets


def iterations(run: TinyRun) -> list[int]:
    lines = (run.run / "metrics.jsonl").read_text().splitlines()
    return [line["iteration"] for line in map(json.loads, lines) if "lm loss" in line]


@pytest.mark.slow
def test_ctrl_c_saves_and_names_the_checkpoint(interrupted: tuple[TinyRun, Done]) -> None:
    run, done = interrupted
    assert done.code == 130, done.stderr
    assert done.stderr == ""
    assert "stopping after this step and saving" in done.stdout
    step = iterations(run)[-1]
    assert 3 <= step < 2000
    assert f"stopped; {run.checkpoints} holds step {step}, from which the same command resumes" in done.stdout
    assert (run.checkpoints / f"iter_{step:07d}" / ".metadata").is_file()
    assert "validation" not in done.stdout


@pytest.mark.slow
def test_the_same_command_goes_on_from_there(interrupted: tuple[TinyRun, Done], tmp_path: Path) -> None:
    stopped, _ = interrupted
    run = TinyRun(tmp_path / "copy")
    shutil.copytree(stopped.folder, run.folder)
    run.recipe.write_text(stopped.recipe.read_text().replace(str(stopped.run), str(run.run)))
    step = iterations(run)[-1]
    done = run.pretrain(fields=["megatron.exit_interval=1"])
    assert done.code == 0, done.stderr
    assert re.findall(r"^iteration (\d+)/2000", done.stdout, re.MULTILINE) == [str(step + 1)]
    assert iterations(run) == list(range(1, step + 2))


@pytest.mark.slow
def test_a_signal_to_any_rank_is_told_to_the_supervisor(tiny: TinyRun, tmp_path: Path) -> None:
    """Megatron stops all ranks then; without the note it looks as if the recipe had asked for it."""
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    words = command("pretrain", str(tiny.recipe), "--nproc", "2", *sets(["training.train_iters=100000"]))
    environment = ENVIRONMENT | {"TXSSM_ATTEMPT": str(attempt)}
    with (tiny.folder / "said").open("w") as stream, subprocess.Popen(words, stdout=stream, env=environment) as process:
        try:
            while "iteration 2/" not in (tiny.folder / "said").read_text() and process.poll() is None:
                time.sleep(0.05)
            ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
            ranks["1"].terminate()
            assert process.wait(timeout=600) == 0
        finally:
            process.kill()
    assert (attempt / "stopped").exists()
