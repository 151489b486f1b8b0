"""A save that fails or must not be ends the run at once with the reason; the same command goes on from the last one."""

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.tiny_run import ENVIRONMENT, Done, TinyRun, command, sets

pytestmark = pytest.mark.slow


def steps(run: TinyRun) -> list[int]:
    lines = (run.run / "metrics.jsonl").read_text().splitlines()
    return [line["iteration"] for line in map(json.loads, lines) if "lm loss" in line]


def pretrain_with_small_files(run: TinyRun, fields: list[str]) -> Done:
    """On two ranks that may write no file above 180 kB: enough for their logs, not for half a checkpoint."""
    words = command("pretrain", str(run.recipe), "--nproc", "2", *sets(fields))
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=900,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (180_000, 180_000)),
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def begun(interrupted: tuple[TinyRun, Done], tmp_path: Path) -> TinyRun:
    """A copy of a run that has saved its last step."""
    stopped, _ = interrupted
    run = TinyRun(tmp_path / "copy")
    shutil.copytree(stopped.folder, run.folder, ignore=shutil.ignore_patterns("logs"))
    run.recipe.write_text(stopped.recipe.read_text().replace(str(stopped.run), str(run.run)))
    return run


def saved_step(run: TinyRun) -> int:
    return int((run.checkpoints / "latest_checkpointed_iteration.txt").read_text())


def test_a_failed_save_ends_at_once_and_the_command_goes_on(begun: TinyRun) -> None:
    saved = steps(begun)[-1]
    # The next multiple of 3.
    failing = saved // 3 * 3 + 3
    done = pretrain_with_small_files(begun, ["checkpoint.save_interval=3"])
    assert done.code == 1, done
    assert f"the checkpoint of step {failing} could not be written to {begun.checkpoints}: " in done.stderr
    assert "File too large" in done.stderr
    assert f"the same command continues from step {saved}" in done.stderr
    assert not (begun.run / "running.json").exists()
    assert saved_step(begun) == saved
    # What it had written would hold the room of the next.
    assert not (begun.checkpoints / f"iter_{failing:07d}").exists()
    # On one rank, whatever those two have left.
    again = begun.pretrain(fields=["checkpoint.save_interval=3", f"megatron.exit_interval={failing}"])
    assert again.code == 0, again.stderr
    assert f"iteration {saved + 1}/2000" in again.stdout
    assert saved_step(begun) == failing


def test_a_gradient_that_is_not_finite_leaves_the_last_checkpoint_the_newest(begun: TinyRun) -> None:
    # Megatron would save one of which every resume repeats the step and ends, whatever the learning rate.
    saved = steps(begun)[-1]
    done = begun.pretrain(fields=["optimizer.learning_rate=1e30", "optimizer.schedule_at_resume=recipe"])
    assert done.code == 1, done
    assert f"the loss or a gradient of step {saved + 2} is NaN or infinite" in done.stderr
    assert "FloatingPointError" in done.stderr
    assert "rank 0 (node " in done.stderr
    assert f"The last sound checkpoint is that of step {saved}: its weights were read and are finite" in done.stderr
    assert saved_step(begun) == saved
