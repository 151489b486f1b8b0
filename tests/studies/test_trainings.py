"""How a study trains its runs: several at once, failures, stopping, continuing. Most without Megatron."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_txssm.holders import Holder, write_holder
from megatron_txssm.recipe.changes import changed
from megatron_txssm.studies import trainings
from megatron_txssm.studies.study import StudyRun, begin, runs_of
from megatron_txssm.studies.trainings import train
from tests.support.recipes import TINY

STAND_IN = Path(__file__).with_name("stand_in_pretrain.py")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "PRETRAIN", (sys.executable, "-I", str(STAND_IN)))
    monkeypatch.setattr(trainings, "_POLL_SECONDS", 0.01)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def runs(folder: Path, *names: str, seeds: int = 1) -> list[StudyRun]:
    recipe = changed(TINY, {"megatron.mock_data": True, "checkpoint.save_interval": None})
    begin(folder, dict.fromkeys(names, recipe), range(1, seeds + 1), {"study": "stand-in"}, None)
    return runs_of(folder)


def starts(run: StudyRun) -> list[str]:
    """The step that each start of a run began at, and "end"."""
    return (run.path / "starts").read_text().split()


def test_all_runs_are_trained_and_finished_ones_are_not_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = runs(tmp_path, "a", "b", seeds=2)
    assert train("test", found, parallel=2) == []
    assert all(run.is_finished and starts(run) == ["0", "end"] for run in found)
    cores = len(os.sched_getaffinity(0))
    assert {(run.path / "threads").read_text() for run in found} == {str(max(1, cores // 2))}
    said = capsys.readouterr().out
    assert "test: 0 of 4 runs are finished, 80 steps to go" in said and "; 4 of 4 runs" in said
    more = runs(tmp_path, "a", "b", seeds=3)
    assert train("test", more) == []
    assert [starts(run) for run in more] == [["0", "end"]] * 6
    assert "4 of 6 runs are finished, 40 steps to go" in capsys.readouterr().out


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = runs(tmp_path, "broken", "sound")
    failed = train("test", found)
    assert [run.variant for run in failed] == ["broken"]
    assert found[1].is_finished
    assert "broken-seed1: failed at step 10" in capsys.readouterr().out
    assert "out of memory" in (failed[0].path / "logs" / "study.out").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_continues_where_it_was(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    found = runs(tmp_path, "slow_1", "slow_2", "third")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        with _when(lambda: all(run.steps_done == 10 for run in found[:2]), number):
            train("test", found, parallel=2)
    said = capsys.readouterr().out
    assert "finishes its step and saves" in said and "stopped; the same command continues" in said
    assert [starts(run) for run in found[:2]] == [["0", "end"]] * 2, "both ended in order"
    assert not (found[2].path / "starts").exists(), "only two at once"
    assert train("test", found, parallel=2) == []
    assert [starts(run) for run in found] == [["0", "end", "10", "end"]] * 2 + [["0", "end"]]
    assert "0 of 3 runs are finished, 40 steps to go" in capsys.readouterr().out


def test_a_run_that_another_process_trains_is_waited_for(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, "a")
    lock = run.path / "running.json"
    write_holder(lock, Holder.myself())

    def finish() -> None:
        (run.path / "metrics.jsonl").write_text('{"iteration": 20, "grad_norm": 1.0}\n')
        lock.unlink()

    timer = threading.Timer(0.3, finish)
    timer.start()
    assert train("test", [run]) == []
    timer.join()
    assert not (run.path / "starts").exists()


@contextlib.contextmanager
def _when(is_true: Callable[[], bool], number: signal.Signals) -> Iterator[None]:
    """Send this process a signal once something is true."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            if is_true():
                os.kill(os.getpid(), number)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
