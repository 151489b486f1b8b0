"""While slurmctld is away, the commands say what is known, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.sandbox import Sandbox
from tests.cluster.training_job import TrainingJob, txssm, write_data


@pytest.fixture
def job(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    """A job on two nodes whose trainer is light, and steps until it is stopped."""
    job = TrainingJob(sandbox, tmp_path / "job", write_data(tmp_path / "data"))
    python = job.folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("light_trainer.py")} "$@"\n')
    python.chmod(0o755)
    settings = job.folder / "env.sh"
    settings.write_text(f"TXSSM_STEP_PYTHON={python}\n")
    monkeypatch.setitem(sandbox.env, "TXSSM_ENV", str(settings))
    return job


@pytest.mark.slow
def test_the_commands_while_slurmctld_is_away(sandbox: Sandbox, job: TrainingJob) -> None:
    job.submit()
    # As three who submit at once, or somebody by hand: submission.json does not know it.
    second = sandbox.slurm("sbatch", "--parsable", "--hold", "./pretrain.sbatch", cwd=job.run).strip()
    job.wait_step(5)
    job.wait_state_saved()
    held = txssm(sandbox, "jobs").stdout
    assert f"job {second}: it is held: scontrol release {second}" in held
    command = [sys.executable, "-m", "megatron_txssm.cli", "logs", "-f", str(job.run)]
    with (job.folder / "said").open("w") as said:
        follow = subprocess.Popen(command, env=sandbox.env, stdout=subprocess.DEVNULL, stderr=said)
    sandbox.must("kill-slurmctld")
    try:
        jobs = txssm(sandbox, "jobs")
        assert jobs.returncode == 2 and "Slurm does not answer (squeue" in jobs.stderr
        cancel = txssm(sandbox, "cancel", str(job.run))
        assert cancel.returncode == 2 and f"no job of {job.run} was cancelled: Slurm does not answer" in cancel.stderr
        assert "running jobs continue; try again when `scontrol ping`" in cancel.stderr
        why = job.why()
        assert "no attempt has ended yet" in why and f"attempt 1 of job {job.job} trains (process" in why
        assert "Slurm does not answer" in why and "what to do" not in why
        job.wait_until(lambda: (job.folder / "said").read_text() != "", "the line about Slurm")
        assert follow.poll() is None
    finally:
        sandbox.must("start-slurmctld")
    assert f"attempt 1 of job {job.job} is RUNNING on n[1-2]: step " in job.why()
    cancelled = txssm(sandbox, "cancel", str(job.run)).stdout
    assert f"cancelled job {job.job} (" in cancelled and f"cancelled job {second} (" in cancelled
    job.wait_over("CANCELLED")
    assert follow.wait(600) == 0
    said = (job.folder / "said").read_text()
    assert said.count("\n") == 1 and f"unknown whether job {job.job} has ended, still following" in said
    why = job.why()
    assert "somebody cancelled the job" in why and "continue from its checkpoint: cd " in why and "txssm submit" in why
