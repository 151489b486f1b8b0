"""A run that becomes slow says so, and names the rank for which the others wait: two real ranks over gloo.

Its steps are mostly sleep, more of it when they are slow and none when they are fast again: other load of the machine,
however it changes, decides nothing.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.jobs.goodput import slowness
from megatron_txssm.training.watch.throughput import MIN_SAMPLES
from tests.support.tiny_run import ENVIRONMENT, TinyRun

PATIENCE = 600  # seconds
# Of sleep in a step, many times the step itself.
USUAL, SLOW = 0.5, 2.5
FIELDS = (
    "training.train_iters=1000000",
    "logging.eval_iters=0",
    "logging.log_interval=100",
    "checkpoint.save_interval=null",
)


class SlowRun:
    """A tiny run on two ranks, which trains until the test is over."""

    def __init__(self, tiny: TinyRun):
        self.tiny = tiny
        worker = [str(Path(__file__).parent / "slow_worker.py"), str(tiny.recipe)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *worker]
        self.said = tiny.folder / "said"
        self.sleep(USUAL, USUAL)
        with self.said.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *(word for field in FIELDS for word in ("--set", field))],
                env=ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def steps(self) -> list[dict[str, Any]]:
        path = self.tiny.run / "metrics.jsonl"
        # Its last line may be half written.
        lines = path.read_text().splitlines(keepends=True)[:-1] if path.exists() else []
        return [line for line in map(json.loads, lines) if "step_seconds" in line]

    def wait_until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The last step, when it is so."""
        end = time.monotonic() + PATIENCE
        while not ((steps := self.steps) and condition(steps[-1])):
            assert self.process.poll() is None and time.monotonic() < end, self.said.read_text()
            time.sleep(0.1)
        return steps[-1]

    def sleep(self, *seconds: float) -> None:
        """From now on for so long in each step, rank by rank."""
        for rank, wanted in enumerate(seconds):
            (self.tiny.folder / f"slow_{rank}").write_text(str(wanted))


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.support.tiny_run import make_tiny_run

    run = SlowRun(make_tiny_run(tmp_path_factory.mktemp("slow")))
    yield run
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()


@pytest.mark.slow
def test_the_rank_that_the_others_wait_for_is_named(slow_run: SlowRun) -> None:
    slow_run.wait_until(lambda step: step["iteration"] >= 2 * (MIN_SAMPLES + 2))
    for slow in (1, 0):
        slow_run.sleep(*(SLOW if rank == slow else USUAL for rank in range(2)))
        found = slow_run.wait_until(lambda step, slow=slow: step.get("slow", {}).get("ranks") == [slow])["slow"]
        assert found["fraction"] < 0.7
        assert found["reason"].startswith(f"the others wait for rank {slow} on {os.uname().nodename} (")
        assert found["nodes"] == [os.uname().nodename]
        assert f"rank {slow} on" in slowness(slow_run.tiny.run / "metrics.jsonl")
    # Which of them it is told of first, other load of this machine may decide.
    assert "of its median throughput: the others wait for rank " in slow_run.said.read_text()
    slow_run.sleep(0, 0)
    slow_run.wait_until(lambda step: "slow" not in step)
    assert slowness(slow_run.tiny.run / "metrics.jsonl") == ""
    slow_run.wait_until(lambda _: "throughput is back near its median" in slow_run.said.read_text())


@pytest.mark.slow
def test_where_all_are_slow_none_is_named(slow_run: SlowRun) -> None:
    slow_run.wait_until(lambda step: step["iteration"] >= 2 * (MIN_SAMPLES + 2))
    slow_run.sleep(SLOW, SLOW)
    found = slow_run.wait_until(lambda step: "slow" in step and step["slow"]["ranks"] == [])["slow"]
    assert "no rank stands out" in found["reason"]
