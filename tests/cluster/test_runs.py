"""A run's day: other numbers of nodes, a node that is not fit, cancelling, following, and batch scripts by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.sandbox import ROOT, Sandbox
from tests.cluster.training_job import TrainingJob, txssm, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_a_cancelled_run_goes_on_where_it_was_on_another_number_of_nodes(
    sandbox: Sandbox, data: Path, tmp_path: Path
) -> None:
    job = TrainingJob(sandbox, tmp_path / "job", data)
    job.submit()
    job.wait_step(15)
    again = txssm(sandbox, "submit", str(job.recipe), "--nodes", "1", "--nproc-per-node", "1")
    assert again.returncode == 2 and f"already has job {job.job} (RUNNING)" in again.stderr
    jobs = txssm(sandbox, "jobs").stdout
    assert job.job in jobs and "RUNNING" in jobs and "of 60" in jobs

    assert f"cancelled job {job.job}" in txssm(sandbox, "cancel", str(job.run)).stdout
    job.wait_over("CANCELLED")
    # Also where Slurm's KillWait was too short for the supervisor to say so itself.
    why = job.why()
    assert "somebody cancelled the job" in why and "submit it again to continue from its checkpoint" in why
    stopped_at = job.saved()
    assert stopped_at == job.steps()[-1][0] >= 15

    job.submit(nodes=1)
    job.wait_over()
    first, second = job.attempts()
    assert (first.nodes, second.nodes) == (["n1", "n2"], ["n1"])
    assert [step for step, _ in job.steps()] == list(range(1, 61))
    assert (second.saved_before, second.cause) == (stopped_at, "finished")
    # A finished run is not started again.
    done = txssm(sandbox, "submit", str(job.recipe), "--nodes", "1", "--nproc-per-node", "1")
    assert done.returncode == 0 and "already finished" in done.stdout

    undisturbed = TrainingJob(sandbox, tmp_path / "undisturbed", data)
    local = txssm(sandbox, "pretrain", str(undisturbed.recipe), "--nproc", "2")
    assert local.returncode == 0, local.stderr
    # fp32: the same sums over one rank and over two.
    assert dict(job.steps()) == pytest.approx(dict(undisturbed.steps()), abs=1e-5)


@pytest.mark.slow
def test_a_node_that_fails_the_preflight_is_named_and_left_out(sandbox: Sandbox, data: Path, tmp_path: Path) -> None:
    job = TrainingJob(sandbox, tmp_path / "job", data)
    job.run.mkdir()
    sandbox.must("shell", "n2", "mount", "--bind", str(job.run), str(job.run))
    sandbox.must("shell", "n2", "mount", "-o", "remount,ro,bind", str(job.run))
    try:
        job.submit()
        job.wait_over()
    finally:
        sandbox.must("shell", "n2", "umount", str(job.run))
    first, second = job.attempts()
    assert first.nodes == ["n1", "n2"] and first.cause == "preflight"
    assert list(first.failed_nodes) == ["n2"]
    assert first.failed_nodes["n2"] == [f"{job.run} cannot be written: Read-only file system"]
    assert second.nodes == ["n1", "n3"] and second.cause == "finished"
    assert f"preflight: n2 is unhealthy: {job.run} cannot be written" in job.output()
    # No step was begun with it.
    assert first.last_step is None and first.exit_code is None


@pytest.mark.slow
def test_where_every_node_fails_the_job_ends_and_says_so(sandbox: Sandbox, data: Path, tmp_path: Path) -> None:
    """GPUs that Slurm counts and no driver knows."""
    job = TrainingJob(sandbox, tmp_path / "job", data)
    done = txssm(sandbox, "submit", str(job.recipe), "--nodes", "2", "--gpus-per-node", "2", cwd=job.folder)
    assert done.returncode == 0, done.stderr
    job.job = json.loads((job.run / "submission.json").read_text())["jobs"]["pretrain"][0]
    job.wait_over("FAILED")
    (attempt,) = job.attempts()
    assert attempt.cause == "preflight" and sorted(attempt.failed_nodes) == ["n1", "n2"]
    why = job.why()
    assert "2 GPUs were requested, but nvidia-smi fails" in why
    assert "not requeued: every node failed the preflight" in why


@pytest.mark.slow
def test_a_run_that_fails_before_its_first_step_is_not_started_again(
    sandbox: Sandbox, data: Path, tmp_path: Path
) -> None:
    """It has come no further, so nothing speaks for another try."""
    job = TrainingJob(sandbox, tmp_path / "job", data)
    # The tokens of the data go up to 63.
    job.submit("--set", "data.vocab_size=2", "--set", "data.make_vocab_size_divisible_by=2")
    job.wait_over("FAILED")
    assert len(job.attempts()) == 1 and job.attempts()[0].cause in ("failed", "refused")
    assert "first failure" in job.why() or "correct what the message names" in job.why()


@pytest.mark.slow
def test_a_batch_script_by_hand_and_its_log(sandbox: Sandbox, data: Path, tmp_path: Path) -> None:
    job = TrainingJob(sandbox, tmp_path / "job", data)
    words = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--parsable", "--output=hand.out"]
    script = str(ROOT / "slurm" / "pretrain.sbatch")
    environment = sandbox.env | {"TXSSM_HOME": str(ROOT), "TXSSM_PYTHON": sys.executable}
    done = subprocess.run(
        ["sbatch", *words, script, str(job.recipe), "--set", "training.train_iters=12"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job.job = done.stdout.strip()
    job.wait_over()
    assert (tmp_path / "hand.out").read_text().count("iteration ") == 12
    assert job.attempts()[0].cause == "finished"


def test_every_script_is_clean() -> None:
    scripts = [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch"), ROOT / "tools" / "slurm_sandbox"]
    assert len(scripts) >= 7
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK) or script.suffix == ".sbatch" or script.name.startswith("env"), script
    done = subprocess.run(["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
