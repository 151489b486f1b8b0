"""A cluster that is made of stand-ins, for the tests of this folder that ask for it."""

import os
from pathlib import Path

import pytest

from tests.jobs.stand_in_slurm import write_command
from tests.slurm.some_queue import write_queue


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-ins, first on PATH: an empty queue, and a scancel that notes what it is told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.defpath}")
    monkeypatch.chdir(tmp_path)
    write_queue(folder)
    write_command(folder, "scancel", f'echo "$@" >>{folder}/cancelled')
    write_command(folder, "sinfo", "exit 0")
    return folder
