"""What several files of this folder expect of a command that must be refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[list[Any], list[str]], None]:
    """Runs a command that must be refused with these texts, and leaves everything as it was."""

    def run(words: list[Any], wanted: list[str]) -> None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        errors = [line for line in captured.err.splitlines() if not line.startswith("Loading weights")]
        assert len(errors) == 1 and errors[0].startswith("error: "), captured.err
        for text in wanted:
            assert text in errors[0], errors[0]
        assert sorted(tmp_path.rglob("*")) == before

    return run
