"""When a step counts as hung, and what is done then."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.launch import stall
from megatron_txssm.launch.stall import STARTUP_SECONDS, StallWatch

STACKS = "Current thread 0x00007f3a (most recent call first):\n  File train.py, line 3 in step\n"


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock, which stands still."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("time.sleep", pass_time)
    return pass_time


def do_step(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1}\n')


def test_the_start_has_more_time_than_a_step(tmp_path: Path, pass_time: Callable[[float], None]) -> None:
    watch = StallWatch(tmp_path, 60)
    pass_time(STARTUP_SECONDS)
    assert not watch.is_stalled()
    pass_time(1)
    assert watch.is_stalled()


def test_a_timeout_longer_than_the_start_holds_for_it_too(tmp_path: Path, pass_time: Callable[[float], None]) -> None:
    watch = StallWatch(tmp_path, 2 * STARTUP_SECONDS)
    pass_time(2 * STARTUP_SECONDS)
    assert not watch.is_stalled()
    pass_time(1)
    assert watch.is_stalled()


def test_every_line_starts_the_time_anew(tmp_path: Path, pass_time: Callable[[float], None]) -> None:
    watch = StallWatch(tmp_path, 60)
    for _ in range(5):
        do_step(tmp_path)
        assert not watch.is_stalled()
        pass_time(60)
        assert not watch.is_stalled()
    pass_time(1)
    assert watch.is_stalled()
    # It was slow, not hung.
    do_step(tmp_path)
    assert not watch.is_stalled()


def test_a_resumed_run_has_its_start_too(tmp_path: Path, pass_time: Callable[[float], None]) -> None:
    # Its metrics are there already.
    do_step(tmp_path)
    watch = StallWatch(tmp_path, 60)
    pass_time(61)
    assert not watch.is_stalled()
    do_step(tmp_path)
    assert not watch.is_stalled()
    pass_time(61)
    assert watch.is_stalled()


def test_a_file_system_that_does_not_answer_is_no_step(
    tmp_path: Path, pass_time: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    do_step(tmp_path)
    watch = StallWatch(tmp_path, 60)
    do_step(tmp_path)
    assert not watch.is_stalled()

    def stale(path: Path, **_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "stat", stale)
    pass_time(60)
    assert not watch.is_stalled()
    pass_time(1)
    assert watch.is_stalled()


class Slurm:
    """Plays squeue and scancel; at SIGUSR2 some ranks write their stacks."""

    def __init__(self, run: Path, answering: tuple[int, ...] = (), steps: str = "21.0 preflight\n21.1 train\n"):
        self.run, self.answering, self.steps = run, answering, steps
        self.said: list[tuple[str, ...]] = []

    def __call__(self, *command: str, **_: object) -> str:
        self.said.append(command)
        if command[0] == "squeue":
            return self.steps
        if command[1] == "--signal=USR2":
            for rank in self.answering:
                with (self.run / "logs" / f"rank_{rank}.log").open("a") as file:
                    file.write(STACKS)
        return ""


@pytest.fixture
def srun() -> subprocess.Popen:
    return subprocess.Popen(["sleep", "600"])


def end_step(run: Path, srun: subprocess.Popen, num_ranks: int) -> dict:
    watch = StallWatch(run, 60)
    watch.grew -= 61.44
    try:
        return watch.end_step("21", srun, num_ranks)
    finally:
        running = srun.poll() is None
        srun.kill()
        # A process killed a moment ago may still count as running.
        running = running and srun.wait() != -9
        assert not running


def test_the_step_named_train_is_ended_after_its_stacks(
    tmp_path: Path, pass_time: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, srun: subprocess.Popen
) -> None:
    (tmp_path / "logs").mkdir()
    # Of an attempt before: these are not this one's.
    for rank in (0, 2):
        (tmp_path / "logs" / f"rank_{rank}.log").write_text(STACKS)
    slurm = Slurm(tmp_path, answering=(0, 1))
    monkeypatch.setattr(stall, "run_slurm", slurm)
    # Ranks 0 and 1 answer, 2 does not, 3 has no log.
    assert end_step(tmp_path, srun, 4) == {"seconds": 61.4, "silent_ranks": [2, 3]}
    assert slurm.said[1:] == [("scancel", "--signal=USR2", "21.1"), ("scancel", "--signal=KILL", "21.1")]


@pytest.mark.parametrize("steps", ["", "21.0 preflight\n", "121.1 train\n", "21.1 train2\n"])
def test_without_a_step_of_that_name_its_srun_is_ended(
    tmp_path: Path,
    pass_time: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    srun: subprocess.Popen,
    steps: str,
) -> None:
    slurm = Slurm(tmp_path, steps=steps)
    monkeypatch.setattr(stall, "run_slurm", slurm)
    assert end_step(tmp_path, srun, 1)["silent_ranks"] == []
    assert [command[0] for command in slurm.said] == ["squeue"]
    assert srun.returncode == -9


def test_without_slurmctld_its_srun_is_ended(
    tmp_path: Path, pass_time: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, srun: subprocess.Popen
) -> None:
    def away(*command: str) -> str:
        raise UserError("squeue does not answer")

    monkeypatch.setattr(stall, "run_slurm", away)
    assert end_step(tmp_path, srun, 1) == {"seconds": 61.4, "silent_ranks": []}
    assert srun.returncode == -9
