"""A Slurm cluster of three nodes, simulated on this machine, for every test of this folder that asks for it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.sandbox import Sandbox, claim_sandbox, why_not


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=3, help="of test_drill.py")
    parser.addoption("--drill-seed", type=int, default=1, help="of test_drill.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The hook sees the tests of all folders.
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    if lacks := why_not():
        pytest.skip(lacks)
    sandbox = claim_sandbox()
    sandbox.must("up", "3")
    yield sandbox
    sandbox.release(keep_logs=request.session.testsfailed > 0)


_REPORT = pytest.StashKey[list[str]]()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes a line for the end of pytest's output."""
    return request.config.stash.setdefault(_REPORT, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_REPORT, []):
        terminalreporter.write_line(line)
