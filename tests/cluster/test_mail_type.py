"""Slurm's own mails: sbatch takes their options from a batch script that `txssm submit` writes."""

from pathlib import Path

import pytest

from tests.cluster.sandbox import Sandbox
from tests.cluster.training_job import TrainingJob, txssm, write_data

HEADER = ("#SBATCH --mail-type=FAIL,REQUEUE,TIME_LIMIT_90", "#SBATCH --mail-user=lab@example.org")


@pytest.fixture(scope="module")
def job(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return TrainingJob(sandbox, tmp_path_factory.mktemp("mail") / "job", write_data(tmp_path_factory.mktemp("data")))


def dry_run(job: TrainingJob, *words: str) -> str:
    """The script that `sbatch --test-only` has accepted."""
    layout = ("--nodes", "2", "--nproc-per-node", "1", "--dry-run")
    done = txssm(job.sandbox, "submit", str(job.recipe), *layout, *words, cwd=job.folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_as_options_of_submit(job: TrainingJob) -> None:
    words = ("--sbatch", "mail-type=FAIL,REQUEUE,TIME_LIMIT_90", "--sbatch", "mail-user=lab@example.org")
    assert set(HEADER) <= set(dry_run(job, *words).splitlines())


def test_as_a_setting_of_the_site(job: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "env.sh"
    options = " ".join(line.removeprefix("#SBATCH --") for line in HEADER)
    settings.write_text(f'export TXSSM_SBATCH_OPTIONS="{options}" TXSSM_WEBHOOK=https://hooks.invalid/s3cr3t\n')
    monkeypatch.setitem(job.sandbox.env, "TXSSM_ENV", str(settings))
    script = dry_run(job)
    assert set(HEADER) <= set(script.splitlines())
    # The webhook's address is a secret: jobs read it from the site's file.
    assert "s3cr3t" not in script


def test_sbatch_itself_refuses_a_type_that_there_is_not(job: TrainingJob) -> None:
    layout = ("--nodes", "2", "--nproc-per-node", "1", "--dry-run")
    done = txssm(job.sandbox, "submit", str(job.recipe), *layout, "--sbatch", "mail-type=WHENEVER", cwd=job.folder)
    assert done.returncode == 2 and "mail" in done.stderr
