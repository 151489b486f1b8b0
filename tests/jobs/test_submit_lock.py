"""Of several submissions of one run at once, one queues."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm import holders
from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.home import HOME
from megatron_txssm.jobs import submit
from megatron_txssm.jobs.submission.submit_lock import NAME, SubmitLock
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.launch import run_lock
from megatron_txssm.training.launch.run_lock import Holder
from tests.slurm.some_queue import LETTERS, SQUEUE, write_queue

# Queues a job as Slurm does: whoever asks after its answer sees it. Takes its time, until `go` is there.
SBATCH = """\
#!/bin/bash
here=$(dirname "$0")
[ "$1" = --test-only ] && { touch "$here/checked_$PPID"; exit 0; }
for ((i = 0; i < 30000; i++)); do [ -e "$here/go" ] && break; sleep 0.02; done
echo "${@: -1}" >> "$here/queued"
line=$'\\x1e'
for letter in LETTERS; do
    case $letter in %i) value=17 ;; %T) value=PENDING ;; %o) value=${@: -1} ;; *) value= ;; esac
    line+=$value$'\\x1f'
done
echo "${line%?}" >> "$here/queue"
echo 17
""".replace("LETTERS", " ".join(LETTERS.values()))
FIELDS = ("megatron.mock_data=true", "logging.eval_iters=1")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "queue").touch()
    yield folder
    # Who still waits after a failure ends.
    (folder / "go").touch()


def start(cluster: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TXSSM_", "S"))}
    environment |= {"TXSSM_CHECK_BUILD": "0", "PATH": f"{cluster}:{os.environ['PATH']}", "PYTHONPATH": str(HOME)}
    command = [sys.executable, "-m", "megatron_txssm.cli", "submit", "demo_cpu", "--nodes=1", "--nproc-per-node=2"]
    command += [f"--set={text}" for text in FIELDS]
    return subprocess.Popen(
        command, env=environment, cwd=cluster.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(what: str, condition: Callable[[], object]) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_three_at_once_queue_one_job(cluster: Path) -> None:
    submissions = [start(cluster) for _ in range(3)]
    # All have found the folder free; one of them waits for sbatch.
    wait_for("three checks", lambda: len(list(cluster.glob("checked_*"))) == 3)
    wait_for("two refusals", lambda: sum(each.poll() is not None for each in submissions) == 2)
    (cluster / "go").touch()
    said = {each: each.communicate(timeout=600) for each in submissions}
    assert sorted(each.returncode for each in submissions) == [0, 2, 2], said
    assert len((cluster / "queued").read_text().splitlines()) == 1
    for each, (_, error) in said.items():
        if each.returncode:
            assert error.startswith("error: runs/demo is being submitted by another txssm submit (process ")
            assert error.count("\n") == 1 and "see txssm jobs" in error
    run = cluster.parent / "runs" / "demo"
    assert json.loads((run / "submission.json").read_text())["jobs"] == {"pretrain": ["17"]}
    assert not (run / NAME).exists()


def test_another_was_quicker_since_the_checks(
    cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes to the lock when the other has left it."""
    plan = submit.plan_submission
    monkeypatch.chdir(cluster.parent)
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")

    def planned(*words: Any) -> Any:
        found = plan(*words)
        write_queue(cluster, {"job_id": 17, "state": "PENDING", "command": f"{Path.cwd()}/runs/demo/pretrain.sbatch"})
        return found

    monkeypatch.setattr(submit, "plan_submission", planned)
    words = ["--nodes=1", "--nproc-per-node=2", *(f"--set={text}" for text in FIELDS)]
    assert main(["submit", "demo_cpu", *words]) == 2
    assert capsys.readouterr().err == "error: runs/demo already has job 17 (PENDING); see txssm jobs\n"
    run = cluster.parent / "runs" / "demo"
    assert not (run / NAME).exists() and not (run / "recipe.yaml").exists()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = load_recipe("demo_cpu", [*FIELDS, f"run_directory={tmp_path}/runs/demo"])
    recipe.run_path.mkdir(parents=True)
    return recipe


def test_a_killed_submission_blocks_nobody(cluster: Path) -> None:
    killed = start(cluster)
    lock = cluster.parent / "runs" / "demo" / NAME
    wait_for("the lock", lock.exists)
    killed.kill()
    killed.communicate()
    assert lock.exists()
    (cluster / "go").touch()
    after = start(cluster)
    _, error = after.communicate(timeout=600)
    assert (after.returncode, error) == (0, "")
    assert not lock.exists()


def test_a_submission_that_died_on_another_machine(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "STALE_SECONDS", 0.5)
    theirs = Holder.myself().__dict__ | {"boot": "another", "host": "login2"}
    (recipe.run_path / NAME).write_text(json.dumps(theirs))
    with SubmitLock(recipe):
        assert json.loads((recipe.run_path / NAME).read_text())["boot"] != "another"


def test_one_that_lives_on_another_machine(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Holder.myself().__dict__ | {"boot": "another", "host": "login2"}
    lock = recipe.run_path / NAME
    lock.write_text(json.dumps(theirs))
    monkeypatch.setattr(holders, "is_touched", lambda file: file == lock)
    with pytest.raises(UserError, match=r"another txssm submit \(process \d+ on login2, .*remove .*submitting.json"):
        with SubmitLock(recipe):
            pass
    # It stays theirs.
    assert json.loads(lock.read_text()) == theirs


def test_a_run_that_trains_without_a_job_is_not_submitted(cluster: Path, recipe: Recipe) -> None:
    with run_lock.RunLock(recipe):
        (cluster / "go").touch()
        done = start(cluster)
        _, error = done.communicate(timeout=600)
    assert done.returncode == 2 and "runs/demo is in use by another run (process " in error
    assert not (cluster / "queued").exists()
