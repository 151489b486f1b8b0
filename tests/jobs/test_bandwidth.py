"""The network between nodes: measured by real ranks, judged by what they found."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.home import HOME
from megatron_txssm.jobs.nodes import bandwidth_preflight
from megatron_txssm.jobs.nodes.bandwidth_preflight import measure

NODES = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
# Every "node" is this machine, with two tasks.
SRUN = """\
#!/bin/bash
printf '%s\\n' "$@" > "$(dirname "$0")/words"
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=1 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_TASKS_PER_NODE="2(x2)" SLURM_STEP_NODELIST=127.0.0.1
for task in 3 2 1 0; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NODEID=$((task / 2)) "$@" &
done
wait
"""


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    for name in ("RANK", "TXSSM_ATTEMPT", "TXSSM_SRUN_OPTIONS", "TXSSM_STEP_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S", raising=False)
    return tmp_path / "srun"


def says(srun: Path, text: str, code: int = 0) -> None:
    srun.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" > '{srun.parent}/words'\necho '{text}'\nexit {code}\n")
    srun.chmod(0o755)


def result(allreduce: float, *links: float) -> str:
    return json.dumps({"allreduce": allreduce, "links": links, "seconds": 3.0})


def test_ranks_measure_it(srun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srun.write_text(SRUN)
    srun.chmod(0o755)
    monkeypatch.setattr(bandwidth_preflight, "CPU_MEGABYTES", 0.1)
    monkeypatch.setenv("TXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S", "0")
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
    found = measure(NODES[:2], 0, port, timeout_seconds=600)
    assert found.problems == {}
    assert found.words == [
        f"all-reduce over 2 nodes: {found.measured['allreduce']:.2f} GB/s "
        f"(measured in {found.measured['seconds']:.1f} s)"
    ]
    assert found.measured["allreduce"] > 0 and len(found.measured["links"]) == 2 and min(found.measured["links"]) > 0


@pytest.mark.parametrize(
    ("setting", "gpus", "nodes", "runs"),
    [
        (None, 0, 3, False),
        (None, 8, 1, False),
        (None, 8, 3, True),
        ("off", 8, 3, False),
        ("1", 0, 3, True),
        ("1", 0, 1, False),
    ],
)
def test_when_it_is_measured(
    srun: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None, gpus: int, nodes: int, runs: bool
) -> None:
    says(srun, result(10, *(10.0,) * nodes))
    if setting is not None:
        monkeypatch.setenv("TXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S", setting)
    found = measure(NODES[:nodes], gpus, 20_000, timeout_seconds=600)
    assert (found.measured != {}, (srun.parent / "words").exists()) == (runs, runs)
    if runs:
        words = (srun.parent / "words").read_text().splitlines()
        assert {f"--nodes={nodes}", f"--ntasks-per-node={max(gpus, 1)}", "--timeout=600"} <= set(words)


@pytest.mark.parametrize(
    ("links", "slow"),
    [
        # Into the second, and from it into the third.
        ((20.0, 1.0, 1.0), "127.0.0.2"),
        ((1.0, 20.0, 1.0), "127.0.0.3"),
        # One cable: nobody can say whose.
        ((20.0, 1.0, 20.0), None),
        ((2.0, 2.0, 2.0), None),
    ],
)
def test_a_slow_node_is_named(
    srun: Path, monkeypatch: pytest.MonkeyPatch, links: tuple[float, ...], slow: str | None
) -> None:
    monkeypatch.setenv("TXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S", "5")
    says(srun, result(1.5, *links))
    found = measure(NODES, 0, 20_000, timeout_seconds=600)
    assert list(found.problems) == ([slow] if slow else [])
    for (problem,) in found.problems.values():
        assert problem.startswith("its network reaches 1.00 GB/s, that of the other nodes 20.00")
        assert "(limit 5: TXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S)" in problem
    if slow is None:
        assert found.words[-1].startswith("that is below the limit 5 (TXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S), and no node")
    # Fast enough, whatever its links.
    says(srun, result(5.0, *links))
    assert measure(NODES, 0, 20_000, timeout_seconds=600).problems == {}


def test_a_measurement_that_fails_keeps_nobody_from_training(srun: Path) -> None:
    says(srun, "no JSON", code=1)
    found = measure(NODES, 8, 20_000, timeout_seconds=600)
    assert (found.measured, found.problems) == ({}, {})
    assert found.words[0].startswith("all-reduce between nodes could not be measured: its step ended with exit code 1")


def test_an_answer_that_was_cut_off_is_none(srun: Path) -> None:
    says(srun, '{"allreduce": 10.0, "lin', code=1)
    assert measure(NODES, 8, 20_000, timeout_seconds=600).measured == {}


def test_a_measurement_that_hangs(srun: Path) -> None:
    srun.write_text("#!/bin/bash\nexec sleep 1000\n")
    srun.chmod(0o755)
    found: Any = measure(NODES, 8, 20_000, timeout_seconds=0.2)
    assert found.problems == {} and "it did not end within 0.2 s (--preflight-timeout)" in found.words[0]
