"""One run a folder: a second one is refused while the first lives, and only then."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_txssm import holders
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.launch import run_lock
from megatron_txssm.training.launch.preflight import make_run_directory
from megatron_txssm.training.launch.run_lock import NAME, Holder, RunLock, check_not_running

HOLDS = """
import sys, time
from megatron_txssm.training.launch.run_lock import RunLock
from megatron_txssm.recipe.loader import load_recipe
with RunLock(load_recipe("demo_cpu", sys.argv[1:])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    found = load_recipe("demo_cpu", [f"run_directory={tmp_path}/run"])
    make_run_directory(found)
    return found


def leave(folder: Path, **changes: object) -> Holder:
    """The file of another holder, by default one on another node."""
    other = {"boot": "another", "host": "node7", "pid": 4711, **changes}
    holder = dataclasses.replace(Holder.myself(), token="theirs", **other)
    (folder / NAME).write_text(json.dumps(asdict(holder)))
    return holder


def test_a_holder_that_was_killed_is_waited_for(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a process lives on for a moment behind SIGKILL."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, f"run_directory={recipe.run_path}"], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    looks = []

    def is_killed(pid: int) -> bool:
        looks.append(pid)
        if len(looks) < 3:
            return True
        holder.kill()
        holder.wait()
        return False

    with pytest.raises(UserError, match="in use by another run"):
        check_not_running(recipe)
    monkeypatch.setattr(holders, "_is_killed", is_killed)
    check_not_running(recipe)
    assert set(looks) == {holder.pid}


def test_what_was_killed_shows_it() -> None:
    code = "import time; print('ready', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    assert not holders._is_killed(process.pid)
    process.kill()
    # It has ended, and is kept for its parent.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert holders._is_killed(process.pid)
    process.wait()
    assert not holders._is_killed(process.pid)


def test_it_is_held_for_as_long_as_the_run(recipe: Recipe) -> None:
    file = recipe.run_path / NAME
    with RunLock(recipe):
        assert json.loads(file.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=rf"in use by another run \(process {os.getpid()} on .*, since 20"):
            check_not_running(recipe)
        with pytest.raises(UserError, match="in use by another run"), RunLock(recipe):
            pass
        assert file.exists()
    assert not file.exists()
    with pytest.raises(ZeroDivisionError), RunLock(recipe):
        _ = 1 / 0
    assert not file.exists()


def test_a_killed_process_holds_nothing(recipe: Recipe) -> None:
    command = [sys.executable, "-c", HOLDS, f"run_directory={recipe.run_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process {process.pid} on"):
            check_not_running(recipe)
        process.send_signal(signal.SIGKILL)
        # Until its parent has asked for its exit code, it is still listed.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        check_not_running(recipe)
    assert (recipe.run_path / NAME).exists()
    with RunLock(recipe):
        pass


def test_a_copy_of_a_folder_in_use_is_nobodys(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "STALE_SECONDS", 0.5)
    with RunLock(recipe):
        shutil.copytree(recipe.run_path, tmp_path / "copy")
        with RunLock(load_recipe("demo_cpu", [f"run_directory={tmp_path}/copy"])):
            pass
        # A folder that was moved is still the run's.
        recipe.run_path.rename(tmp_path / "moved")
        with pytest.raises(UserError, match="in use by another run"):
            check_not_running(load_recipe("demo_cpu", [f"run_directory={tmp_path}/moved"]))


def test_a_full_disk_leaves_no_half_of_it(recipe: Recipe) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(UserError, match=f"{NAME} cannot be written: File too large"), RunLock(recipe):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (recipe.run_path / NAME).exists()


def test_a_later_process_of_the_same_number_holds_nothing(recipe: Recipe) -> None:
    leave(recipe.run_path, boot=Holder.myself().boot, pid=os.getpid(), started_ticks="1")
    check_not_running(recipe)


def test_on_another_node_a_sign_of_life_counts(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "STALE_SECONDS", 60.0)
    file = recipe.run_path / NAME
    leave(recipe.run_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 4711 on node7"):
            check_not_running(recipe)
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("text", [None, "", '{"host": "node7"', "[]"])
def test_without_a_sign_of_life_it_is_taken(recipe: Recipe, text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "STALE_SECONDS", 0.5)
    leave(recipe.run_path)
    if text is not None:
        (recipe.run_path / NAME).write_text(text)
    with RunLock(recipe) as lock:
        assert json.loads((recipe.run_path / NAME).read_text())["token"] == lock.me.token
    assert [path.name for path in recipe.run_path.iterdir()] == ["checkpoints"]


def test_what_nobody_has_touched_for_long_is_taken_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders.time, "sleep", lambda seconds: pytest.fail("it waits"))
    leave(recipe.run_path)
    file = recipe.run_path / NAME
    long_ago = file.stat().st_mtime - holders.DEAD_SECONDS - 60
    os.utime(file, (long_ago, long_ago))
    check_not_running(recipe)
    with RunLock(recipe):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_a_requeued_job_takes_it_from_its_earlier_start_at_once(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holders, "STALE_SECONDS", float("inf"))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave(recipe.run_path, job_id="17", restarts=0)
    with RunLock(recipe) as lock:
        assert holders.token_of(recipe.run_path / NAME) == lock.me.token


def test_the_holder_touches_its_file(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    with RunLock(recipe):
        assert holders.is_touched(recipe.run_path / NAME)


def test_what_another_has_taken_is_not_removed(recipe: Recipe) -> None:
    with RunLock(recipe):
        leave(recipe.run_path)
    assert json.loads((recipe.run_path / NAME).read_text())["token"] == "theirs"


def test_checkpoints_elsewhere_are_held_too(recipe: Recipe, tmp_path: Path) -> None:
    elsewhere = [f"checkpoint.directory={tmp_path}/checkpoints"]
    first = load_recipe("demo_cpu", [f"run_directory={tmp_path}/first", *elsewhere])
    second = load_recipe("demo_cpu", [f"run_directory={tmp_path}/second", *elsewhere])
    make_run_directory(first)
    make_run_directory(second)
    with RunLock(first):
        with pytest.raises(UserError, match=f"{tmp_path}/checkpoints is in use"), RunLock(second):
            pass
        assert not (second.run_path / NAME).exists()
