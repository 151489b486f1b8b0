"""A step that goes on without one of its tasks is ended, by whoever can."""

import subprocess
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.supervisor import stall
from megatron_txssm.jobs.supervisor.failed_task import GRACE_SECONDS, LOOK_SECONDS, FailedTaskWatch


@pytest.mark.parametrize("away", [True, False])
def test_srun_cannot_end_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool) -> None:
    now = [1000.0]

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    def run_slurm(*command: str) -> str:
        if away:
            raise UserError("squeue does not answer")
        said.append(command[0])
        return "21.1 train\n"

    said: list[str] = []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", pass_time)
    monkeypatch.setattr(stall, "run_slurm", run_slurm)
    output = tmp_path / "pretrain-21.out"
    # Of the preflight, which may fail on a spare node, or without consequences.
    output.write_text("srun: error: n1: task 0: Exited with exit code 1\n")
    fields = {"job_id": "21", "nodes": ["n1", "n2"], "nproc_per_node": 1, "started": 1.0}
    attempt = Attempt(folder=tmp_path, output=str(output), **fields)
    attempt.skip_output()
    assert attempt.read_output() == ""
    watch, srun = FailedTaskWatch(attempt), subprocess.Popen(["sleep", "600"])
    try:
        assert not watch.ends("21", srun)
        pass_time(10 * GRACE_SECONDS)
        assert not watch.ends("21", srun)
        with output.open("a") as file:
            file.write("iteration 7 | loss 5\nsrun: error: n2: task 1: Kil")
        pass_time(LOOK_SECONDS + 1)
        assert not watch.ends("21", srun) and watch.failed is None
        with output.open("a") as file:
            file.write("led\n")
        pass_time(LOOK_SECONDS + 1)
        assert not watch.ends("21", srun)
        pass_time(GRACE_SECONDS - 1)
        assert not watch.ends("21", srun)
        pass_time(1)
        assert watch.ends("21", srun)
        assert said == ([] if away else ["squeue", "scancel"])
        assert srun.wait(60) == -9
    finally:
        srun.kill()
