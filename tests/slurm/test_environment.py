"""Who this process is: torchrun's variables, a Slurm step's, or nobody's."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.slurm.environment import adopt_slurm_step, is_worker, rendezvous_port

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# As srun 22.05 sets them for task 5 of 7, the second of three nodes.
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    # The job's, not the step's.
    "SLURM_NTASKS": "16",
    "SLURM_NTASKS_PER_NODE": "8",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No launcher's variable is set, and there is no command of Slurm's, as in a container."""
    for name in (*OURS, *STEP):
        # Set first, so that what a test's code sets is removed again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    return monkeypatch


def enter(environment: pytest.MonkeyPatch, **changes: str) -> dict[str, str]:
    for name, value in (STEP | changes).items():
        environment.setenv(name, value)
    adopt_slurm_step()
    return {name: os.environ[name] for name in OURS if name in os.environ}


def test_a_step_becomes_torchs_variables(environment: pytest.MonkeyPatch) -> None:
    assert not is_worker()
    assert enter(environment) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(20000 + 123456 % 12768),
    }
    assert is_worker()


def test_the_last_node_has_its_own_number_of_tasks(environment: pytest.MonkeyPatch) -> None:
    found = enter(environment, SLURM_PROCID="6", SLURM_LOCALID="0", SLURM_NODEID="2")
    assert (found["RANK"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("6", "0", "1")


def test_every_task_finds_the_same_meeting_point(environment: pytest.MonkeyPatch) -> None:
    first = enter(environment)
    environment.delenv("RANK")
    second = enter(environment, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert {first[k] for k in ("MASTER_ADDR", "MASTER_PORT")} == {second[k] for k in ("MASTER_ADDR", "MASTER_PORT")}


def test_torchrun_inside_a_step_wins(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RANK", "1")
    environment.setenv("WORLD_SIZE", "2")
    assert enter(environment) == {"RANK": "1", "WORLD_SIZE": "2"}


def test_a_sites_address_and_port_win(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MASTER_ADDR", "10.0.0.7")
    environment.setenv("MASTER_PORT", "29500")
    found = enter(environment)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["RANK"]) == ("10.0.0.7", "29500", "5")


def test_a_batch_scripts_shell_is_no_step(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_JOB_ID", "7")
    environment.setenv("SLURM_PROCID", "0")
    adopt_slurm_step()
    assert not is_worker()


def test_a_shell_in_a_step_of_one_task_starts_its_own_processes(environment: pytest.MonkeyPatch) -> None:
    assert enter(environment, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1", SLURM_PROCID="0") == {}


@pytest.mark.parametrize("nodes", ["other[1-", ""])
def test_a_list_that_is_none_names_the_remedy(environment: pytest.MonkeyPatch, nodes: str) -> None:
    with pytest.raises(UserError, match=rf"SLURM_STEP_NODELIST='{re.escape(nodes)}'.*set MASTER_ADDR"):
        enter(environment, SLURM_STEP_NODELIST=nodes)


def test_ports_are_below_those_of_outgoing_connections(environment: pytest.MonkeyPatch) -> None:
    found = []
    for job in range(70_000, 82_000):
        environment.setenv("SLURM_JOB_ID", str(job))
        found.append(rendezvous_port())
        assert 20_000 <= rendezvous_port() < 32_768 and 20_000 <= rendezvous_port(15) < 32_768
    # No two of so many jobs in a row meet on a node.
    assert len(set(found)) == len(found)
    assert len({rendezvous_port(attempt) for attempt in range(16)}) == 16


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "NOBODY"])
def test_workers_end_with_torchrun(launcher: str) -> None:
    # The launcher is killed outright, so it cannot tell its worker.
    worker = (
        "import time\n"
        "from megatron_txssm.slurm.environment import end_with_launcher\n"
        "end_with_launcher()\n"
        "print('ready', flush=True)\n"
        "time.sleep(3600)"
    )
    starter = (
        "import os, subprocess, sys\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True)\n"
        "print(worker.pid, flush=True)\n"
        "worker.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", starter],
        env=os.environ | {launcher: "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    ends = launcher != "NOBODY"
    assert gone(pid, seconds=300 if ends else 0.5) == ends
    if not ends:
        os.kill(pid, signal.SIGKILL)
    process.stdout.close()


def gone(pid: int, seconds: float) -> bool:
    import psutil

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False
