"""Which checkpoints are removed, and that a kill, a reader or a failure at any moment costs none that is kept."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm import holders
from megatron_txssm.checkpoint import retention
from megatron_txssm.checkpoint.reading import Reading, living_reader
from megatron_txssm.checkpoint.retention import KEEP, remove_old
from megatron_txssm.checkpoint.steps import TRACKER, damage, find_newest, interrupted_removals
from megatron_txssm.holders import Holder
from tests.checkpoint.some_checkpoints import DATA, make_steps, steps_in

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return make_steps(tmp_path / "checkpoints", range(10, 70, 10))


def step(checkpoints: Path, number: int) -> Path:
    return checkpoints / f"iter_{number:07d}"


def test_the_last_and_every_so_many_steps_are_kept(checkpoints: Path) -> None:
    assert list(remove_old(checkpoints, 2, 30)) == []
    assert steps_in(checkpoints) == [30, 50, 60]
    assert list(remove_old(checkpoints, 1)) == []
    assert steps_in(checkpoints) == [60]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000060", TRACKER]


def test_what_a_user_protects_stays(checkpoints: Path, tmp_path: Path) -> None:
    (step(checkpoints, 20) / KEEP).touch()
    step(checkpoints, 30).rename(tmp_path / "elsewhere")
    step(checkpoints, 30).symlink_to(tmp_path / "elsewhere")
    assert list(remove_old(checkpoints, 1)) == []
    assert steps_in(checkpoints) == [20, 30, 60]
    assert (tmp_path / "elsewhere" / DATA).is_file()


def test_what_is_damaged_neither_counts_nor_goes(checkpoints: Path) -> None:
    (step(checkpoints, 50) / DATA).write_text("")
    assert list(remove_old(checkpoints, 2)) == []
    assert steps_in(checkpoints) == [40, 50, 60]


def test_nothing_goes_unless_the_newest_is_sound(checkpoints: Path) -> None:
    (step(checkpoints, 60) / DATA).unlink()
    assert list(remove_old(checkpoints, 1)) == []
    (checkpoints / TRACKER).unlink()
    assert list(remove_old(checkpoints, 1)) == []
    assert steps_in(checkpoints) == [10, 20, 30, 40, 50, 60]


def test_newer_ones_than_the_trackers_stay(checkpoints: Path) -> None:
    """Of a run that its user has set back."""
    (checkpoints / TRACKER).write_text("40")
    assert list(remove_old(checkpoints, 2)) == []
    assert steps_in(checkpoints) == [30, 40, 50, 60]


def test_a_checkpoint_stays_as_long_as_it_is_read(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (10, 30, 40, 50):
        shutil.rmtree(step(checkpoints, number))
    with Reading(step(checkpoints, 20)), monkeypatch.context() as patched:
        # Its files are in their place at any moment.
        patched.setattr(retention, "_put_aside", lambda folder: pytest.fail(f"{folder} is renamed"))
        said = list(remove_old(checkpoints, 1))
        assert steps_in(checkpoints) == [20, 60]
        assert len(said) == 1 and f"is kept as long as it is read (process {os.getpid()} on" in said[0]
    reading = Reading(step(checkpoints, 20))
    assert living_reader(step(checkpoints, 20)) is not None
    # Of an object that nobody uses any more.
    del reading
    assert list(remove_old(checkpoints, 1)) == []
    assert steps_in(checkpoints) == [60]


def leave_mark(folder: Path, **changes: Any) -> Path:
    """The mark of another reader."""
    file = folder / "reading_theirs.json"
    file.write_text(json.dumps(asdict(dataclasses.replace(Holder.myself(), token="theirs", **changes))))
    return file


def test_a_killed_reader_keeps_nothing(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_mark(step(checkpoints, 10), started_ticks="1")
    leave_mark(step(checkpoints, 20), boot="another", host="node7")
    leave_mark(step(checkpoints, 30), boot="another", host="node8")
    # Those of other nodes are watched; the one on node8 gives a sign of life.
    monkeypatch.setattr(holders, "is_touched", lambda file: "iter_0000030" in str(file))
    said = list(remove_old(checkpoints, 1))
    assert steps_in(checkpoints) == [30, 60]
    assert len(said) == 1 and "on node8" in said[0]


def test_a_reader_that_comes_in_between_keeps_it(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mark lies in the folder that was renamed just then."""
    comes = [None, "a reader"]
    monkeypatch.setattr(retention, "living_reader", lambda folder: comes.pop(0) if comes else None)
    said = list(remove_old(checkpoints, 1))
    assert steps_in(checkpoints) == [10, 60]
    assert len(said) == 1 and "by a process that has just begun" in said[0]
    assert not interrupted_removals(checkpoints)


def test_a_reader_may_lack_the_right_to_write(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path, holder: Holder) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("megatron_txssm.checkpoint.reading.write_holder", refuse)
    with Reading(step(checkpoints, 10)):
        assert living_reader(step(checkpoints, 10)) is None


def test_a_failure_is_reported_and_the_next_time_made_good(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def busy(path: Any, *words: Any, **more: Any) -> None:
        if str(path).endswith(DATA):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        unlink(path, *words, **more)

    monkeypatch.setattr(os, "unlink", busy)
    said = list(remove_old(checkpoints, 5))
    assert len(said) == 1 and "could not be deleted (Device or resource busy: " in said[0]
    assert steps_in(checkpoints) == [20, 30, 40, 50, 60]
    assert len(interrupted_removals(checkpoints)) == 1
    monkeypatch.setattr(os, "unlink", unlink)
    assert list(remove_old(checkpoints, 5)) == []
    assert not interrupted_removals(checkpoints)

    def no_right(self: Path, to: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", no_right)
    said = list(remove_old(checkpoints, 4))
    assert said == [f"{step(checkpoints, 20)} could not be removed: Permission denied"]
    assert not damage(step(checkpoints, 20))


def remove_until(checkpoints: Path, kill_at: int) -> None:
    """Remove, and be killed at the `kill_at`-th change of the folder."""
    changes = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        if event in ("os.rename", "os.remove", "os.rmdir"):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    list(remove_old(checkpoints, 2))


def test_a_kill_at_any_moment_leaves_whole_checkpoints_and_remains(tmp_path: Path) -> None:
    template = make_steps(tmp_path / "template", (10, 20, 30, 40))
    for kill_at in range(1, 100):
        checkpoints = tmp_path / f"killed_{kill_at}"
        shutil.copytree(template, checkpoints)
        process = multiprocessing.get_context("fork").Process(target=remove_until, args=(checkpoints, kill_at))
        process.start()
        process.join(600)
        left = steps_in(checkpoints)
        assert not [number for number in left if damage(step(checkpoints, number))]
        assert left[-2:] == [30, 40]
        newest = find_newest(checkpoints)
        assert newest.step is not None and newest.step.number == 40 and not newest.lost
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert list(remove_old(checkpoints, 2)) == []
        assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000030", "iter_0000040", TRACKER]
    # For each of two: a rename, four files, the folder.
    assert kill_at > 2 * 6
