"""A Slurm cluster of three nodes, simulated on this machine, for every test of this folder that asks for it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.faults import Fault, check_fault
from tests.cluster.sandbox import Sandbox, claim_sandbox, why_not
from tests.cluster.training_job import TrainingJob, write_data


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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(sandbox: Sandbox, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    job = TrainingJob(sandbox, tmp_path_factory.mktemp("undisturbed") / "job", data)
    job.submit()
    job.wait_over()
    assert len(job.attempts()) == 1 and job.attempts()[0].cause == "finished"
    assert [step for step, _ in job.steps()] == list(range(1, 61))
    return dict(job.steps())


@pytest.fixture
def whole_again(sandbox: Sandbox) -> Iterator[None]:
    """Mends every node at the end."""
    yield
    sandbox.mend(["n1", "n2", "n3"])


@pytest.fixture
def disturb(
    sandbox: Sandbox,
    data: Path,
    undisturbed: dict[int, float],
    tmp_path: Path,
    whole_again: None,
    report: Callable[[str], None],
) -> Callable[..., None]:
    """Calls `faults.check_fault` with a job of its own, and reports what the fault cost."""

    def check(name: str, fault: Fault, cause: str, words: Sequence[str] = (), lost: str | None = None) -> None:
        cost = check_fault(TrainingJob(sandbox, tmp_path / "job", data), fault, cause, words, undisturbed, lost)
        report(f"{name:30} {cost}")

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # The last report of a test has its fixtures' lines, too; it may come from another process.
    for test in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(test, pytest.TestReport) and test.when == "teardown":
            for name, line in test.user_properties:
                if name == _REPORT:
                    terminalreporter.write_line(str(line))
