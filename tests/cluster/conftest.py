"""A Slurm cluster of three nodes, simulated on this machine, for every test of this folder that asks for it."""

import itertools
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


_REPORT = "report of tests/cluster"


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Takes a line for the end of pytest's output."""
    return lambda line: record_property(_REPORT, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # The last report of a test has its fixtures' lines, too; it may come from another process.
    for test in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(test, pytest.TestReport) and test.when == "teardown":
            for name, line in test.user_properties:
                if name == _REPORT:
                    terminalreporter.write_line(str(line))
