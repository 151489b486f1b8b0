"""When a step counts as hung, and what is done then."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Hang
from megatron_txssm.jobs.limits import Phase
from megatron_txssm.jobs.supervisor import stall
from megatron_txssm.jobs.supervisor.stall import SUSPENDED_SECONDS, StallWatch, end_leftover_steps

LIMITS: dict[Phase, float] = {"start": 600.0, "step": 60.0, "save": 300.0}
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


def watch_of(run: Path) -> StallWatch:
    return StallWatch(run, run / "checkpoints", LIMITS)


def begin_save(run: Path, step: int) -> None:
    (run / "checkpoints" / f"iter_{step:07d}").mkdir(parents=True)


def wait(watch: StallWatch, pass_time: Callable[[float], None], seconds: float) -> str | None:
    """Look every second, as a supervisor that is not suspended does."""
    found = None
    for _ in range(round(seconds)):
        pass_time(1)
        found = watch.stalled_phase()
    return found


@pytest.mark.parametrize("metrics_before", [False, True])
def test_the_start_has_a_limit_of_its_own(
    tmp_path: Path, pass_time: Callable[[float], None], metrics_before: bool
) -> None:
    if metrics_before:
        # A resumed run has its start, too.
        do_step(tmp_path)
    watch = watch_of(tmp_path)
    assert wait(watch, pass_time, 600) is None
    assert wait(watch, pass_time, 1) == "start"
    # It was slow, not hung.
    do_step(tmp_path)
    assert wait(watch, pass_time, 61) is None
    assert wait(watch, pass_time, 1) == "step"


def test_every_line_starts_the_time_anew(tmp_path: Path, pass_time: Callable[[float], None]) -> None:
    watch = watch_of(tmp_path)
    for _ in range(5):
        do_step(tmp_path)
        assert wait(watch, pass_time, 60) is None
    assert wait(watch, pass_time, 2) == "step"


def test_a_save_has_a_limit_of_its_own(tmp_path: Path, pass_time: Callable[[float], None]) -> None:
    # Of an attempt that was killed in the midst of it; nobody writes there now.
    begin_save(tmp_path, 20)
    watch = watch_of(tmp_path)
    do_step(tmp_path)
    assert wait(watch, pass_time, 1) is None
    begin_save(tmp_path, 30)
    assert wait(watch, pass_time, 299) is None
    assert wait(watch, pass_time, 2) == "save"
    # It ended: what hangs now is a step.
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("30")
    assert watch.stalled_phase() == "step"


def test_what_was_left_half_written_does_not_make_a_step_a_save(
    tmp_path: Path, pass_time: Callable[[float], None]
) -> None:
    begin_save(tmp_path, 20)
    watch = watch_of(tmp_path)
    do_step(tmp_path)
    assert wait(watch, pass_time, 1) is None
    assert wait(watch, pass_time, 61) == "step"


def test_a_suspended_job_did_not_hang(tmp_path: Path, pass_time: Callable[[float], None]) -> None:
    watch = watch_of(tmp_path)
    do_step(tmp_path)
    assert wait(watch, pass_time, 50) is None
    # scontrol suspend stops trainer and supervisor.
    pass_time(36000)
    assert watch.stalled_phase() is None
    assert wait(watch, pass_time, 11) is None
    assert wait(watch, pass_time, 1) == "step"
    # A poll that took long is time that passed.
    do_step(tmp_path)
    assert wait(watch, pass_time, 1) is None
    pass_time(SUSPENDED_SECONDS)
    assert watch.stalled_phase() is None
    pass_time(SUSPENDED_SECONDS)
    assert watch.stalled_phase() is None
    pass_time(1)
    assert watch.stalled_phase() == "step"


def test_a_file_system_that_does_not_answer_is_no_step(
    tmp_path: Path, pass_time: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    do_step(tmp_path)
    watch = watch_of(tmp_path)
    do_step(tmp_path)
    assert watch.stalled_phase() is None

    def stale(path: Path, **_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "stat", stale)
    monkeypatch.setattr(Path, "iterdir", stale)
    assert wait(watch, pass_time, 60) is None
    assert wait(watch, pass_time, 1) == "step"


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

    def ended(self) -> list[tuple[str, ...]]:
        return [command for command in self.said if command[0] == "scancel"]


@pytest.fixture
def srun() -> subprocess.Popen:
    return subprocess.Popen(["sleep", "600"])


def end_step(run: Path, srun: subprocess.Popen, num_ranks: int) -> Hang:
    watch = watch_of(run)
    watch.grew -= 61.44
    try:
        return watch.end_step("21", srun, num_ranks, "step")
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
    assert end_step(tmp_path, srun, 4) == {"seconds": 61.4, "silent_ranks": [2, 3], "during": "step"}
    assert slurm.ended() == [("scancel", "--signal=USR2", "21.1"), ("scancel", "--signal=KILL", "21.1")]
    # Slurm has forgotten the step that this srun waits for, and killed one before it.
    assert srun.returncode == -9


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
    assert end_step(tmp_path, srun, 1)["silent_ranks"] is None
    assert slurm.ended() == []
    assert srun.returncode == -9


def test_without_slurmctld_its_srun_is_ended(
    tmp_path: Path, pass_time: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, srun: subprocess.Popen
) -> None:
    def away(*command: str) -> str:
        raise UserError("squeue does not answer")

    monkeypatch.setattr(stall, "run_slurm", away)
    assert end_step(tmp_path, srun, 1) == {"seconds": 61.4, "silent_ranks": None, "during": "step"}
    assert srun.returncode == -9


def test_the_steps_of_a_killed_supervisor_are_ended(
    tmp_path: Path, pass_time: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["21.0 preflight\n21.1 bandwidth\n21.2 train\n21.4 interactive\n", "21.2 train\n", ""]
    said: list[tuple[str, ...]] = []

    def run_slurm(*command: str, **_: object) -> str:
        if command[0] == "squeue":
            return answers.pop(0)
        said.append(command)
        if command[-1] == "21.0":
            raise UserError("scancel: error: Kill job error on job step id 21.0: Job/step already completing")
        return ""

    monkeypatch.setattr(stall, "run_slurm", run_slurm)
    assert end_leftover_steps("21")
    assert [command[-1] for command in said] == ["21.0", "21.1", "21.2", "21.2"] and answers == []
    # One that a dead node keeps, or that slurmctld believes in, is not waited for without end.
    answers += ["21.1 train\n"] * 1000
    assert not end_leftover_steps("21")
    assert len(answers) > 800


def test_steps_are_asked_for_until_slurmctld_answers(
    pass_time: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [UserError("squeue: error: Unable to contact slurm controller"), "21.2 train\n", ""]

    def run_slurm(*command: str, **_: object) -> str:
        answer = answers.pop(0) if command[0] == "squeue" else ""
        if isinstance(answer, UserError):
            raise answer
        return answer

    monkeypatch.setattr(stall, "run_slurm", run_slurm)
    monkeypatch.setattr("megatron_txssm.slurm.client.run_slurm", lambda *_: "Slurmctld(primary) at host is DOWN")
    assert end_leftover_steps("21") and answers == []
