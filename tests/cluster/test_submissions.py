"""What a submission means to real Slurm: options, lists of nodes, one job a run, and code that stays what it was."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm.home import HOME
from megatron_txssm.jobs.submission.frozen_code import FrozenCode
from megatron_txssm.slurm.hostlist import expand
from megatron_txssm.slurm.sbatch_options import OURS, parse_options
from tests.cluster.sandbox import Sandbox
from tests.cluster.training_job import PATIENCE, TrainingJob, write_data
from tests.slurm.test_hostlist import LISTS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_lists_of_nodes_are_expanded_as_slurm_does(sandbox: Sandbox) -> None:
    for nodes in filter(None, LISTS):
        assert sandbox.slurm("scontrol", "show", "hostnames", nodes).split() == expand(nodes) == LISTS[nodes].split()


def test_every_option_of_sbatch_is_known(sandbox: Sandbox) -> None:
    """Else the beginning of one, such as `mem` of a newer `memory`, would be refused or let through by mistake."""
    options = set(re.findall(r"--([a-z][a-z-]+)", sandbox.slurm("sbatch", "--help")))
    assert len(options) > 60
    for name in options - OURS.keys():
        assert parse_options([f"{name}=1"], "--sbatch") == {name: "1"}


def test_of_three_submissions_at_once_one_queues(sandbox: Sandbox, data: Path, tmp_path: Path) -> None:
    job = TrainingJob(sandbox, tmp_path / "job", data)
    words = ["submit", str(job.recipe), "--nodes", "1", "--nproc-per-node", "1", "--sbatch", "hold"]
    command = [sys.executable, "-m", "megatron_txssm.cli", *words]
    processes = [
        subprocess.Popen(command, env=sandbox.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=PATIENCE) for process in processes]
    lines = sandbox.slurm("squeue", "--noheader", "--format=%i %o").splitlines()
    queued = [line.split()[0] for line in lines if str(job.run) in line]
    sandbox.slurm("scancel", *queued)
    assert sorted(process.returncode for process in processes) == [0, 2, 2], said
    assert json.loads((job.run / "submission.json").read_text())["jobs"] == {"pretrain": queued}
    assert len(queued) == 1
    for process, (_, error) in zip(processes, said, strict=True):
        assert process.returncode == 0 or "another txssm submit" in error or f"has job {queued[0]} (" in error


@pytest.mark.slow
def test_a_job_runs_what_was_submitted_where_ranks_have_no_slurm(sandbox: Sandbox, data: Path, tmp_path: Path) -> None:
    """As in a container, after the checkout went on, and without the submitter's environment (--export=NONE)."""
    checkout = FrozenCode(HOME, tmp_path, None)
    checkout.write()
    # The ranks' Python: there is no command of Slurm's on its PATH.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nPATH=/nowhere exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = f"TXSSM_STEP_PYTHON={python}\nTXSSM_PREFLIGHT_ALLREDUCE_GB_PER_S=0\n"
    (checkout.path / "slurm" / "env.sh").write_text(settings)
    job = TrainingJob(sandbox, tmp_path / "job", data)
    environment = sandbox.env | {"PYTHONPATH": str(checkout.path), "PYTHONSAFEPATH": "1", "SBATCH_EXPORT": "NONE"}
    command = [
        sys.executable,
        "-m",
        "megatron_txssm.cli",
        "submit",
        str(job.recipe),
        "--nodes=2",
        "--nproc-per-node=1",
    ]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    record = json.loads((job.run / "submission.json").read_text())
    job.job = record["jobs"]["pretrain"][0]
    for name in ("supervisor/supervisor.py", "nodes/node_check.py"):
        changed = checkout.path / "megatron_txssm" / "jobs" / name
        assert changed.is_file()
        changed.write_text("raise SystemExit('another version')\n")
    job.wait_step(15)
    assert Path(record["code"]).parent == job.run / "code"
    code = job.process(1).environ()["PYTHONPATH"].partition(":")[0]
    assert code == record["code"]
    sandbox.slurm("scontrol", "requeue", job.job)
    job.wait_until(lambda: len(job.attempts()) > 1, "the next attempt")
    job.wait_over()
    assert [attempt.cause for attempt in job.attempts()][-1] == "finished", job.why()
    assert {step for step, _ in job.steps()} == set(range(1, 61))
    # A node that did not answer the preflight in time is replaced, before anything is measured.
    for attempt in (each for each in job.attempts() if each.last_step):
        measured = json.loads((attempt.folder / "preflight.json").read_text())["bandwidth"]
        assert measured["allreduce"] > 0 and len(measured["links"]) == 2
    assert "preflight: all-reduce over 2 nodes: " in job.output()
