"""Runs that several test files share."""

from pathlib import Path

import pytest

from tests.support.tiny_run import Done, TinyRun, make_tiny_run


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    """A run that has not begun."""
    return make_tiny_run(tmp_path / "tiny")


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, Done]:
    """A run that was stopped by Ctrl-C after a few steps, and what it said. Copy it before going on."""
    run = make_tiny_run(tmp_path_factory.mktemp("interrupted"))
    return run, run.pretrain_and_interrupt("iteration 3/")
