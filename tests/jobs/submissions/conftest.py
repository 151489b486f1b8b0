"""A cluster of scripts in an empty folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.submissions.stand_in_cluster import SBATCH, SCANCEL, Cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """In an empty folder, whose runs/ is the place of the runs."""
    folder = tmp_path / "bin"
    (folder / "queued").mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    before = dict(os.environ)
    for name in before:
        if name.startswith(("TXSSM_", "SBATCH_", "SLURM_", "SQUEUE_")):
            monkeypatch.delenv(name)
    settings = tmp_path / "env.sh"
    settings.touch()
    monkeypatch.setenv("TXSSM_ENV", str(settings))
    monkeypatch.setenv("TXSSM_CHECK_BUILD", "0")
    monkeypatch.setenv("PATH", f"{folder}:{before['PATH']}")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    found = Cluster(folder)
    found.holds()
    yield found
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
