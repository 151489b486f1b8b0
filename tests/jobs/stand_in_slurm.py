"""Stand-ins for Slurm's commands, and what `txssm` prints with them."""

from pathlib import Path

import pytest

from megatron_txssm.cli.main import main

AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def write_command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def away(cluster: Path) -> None:
    write_command(cluster, "squeue", f"echo '{AWAY}' >&2; exit 1")


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command prints."""
    assert main(list(words)) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def output(stage: str, code: int | None, *lines: str) -> str:
    """A job's log; `code`: of its end, None if it has not said so."""
    end = "" if code is None else f"2026-11-26T06:40:00 END {stage}: exit code {code}\n"
    return "".join(f"{line}\n" for line in (f"2026-11-26T06:33:00 START {stage}: job 1, start 1", *lines)) + end
