"""What the supervisor does about faults, on the simulated cluster with a trainer that is a stand-in."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_txssm.jobs.goodput import goodput
from tests.cluster.sandbox import Sandbox
from tests.cluster.stand_in_trainer import losses
from tests.cluster.training_job import TrainingJob, write_data

NODES = ["n1", "n2", "n3"]


class SupervisedJob(TrainingJob):
    """A job on two nodes whose trainer is the stand-in; one step takes 50 ms."""

    def start(self, *words: str, **fault: object) -> None:
        python = self.folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("stand_in_trainer.py")} "$@"\n')
        python.chmod(0o755)
        (self.folder / "env.sh").write_text(f"TXSSM_STEP_PYTHON={python}\n")
        self.sandbox.env["TXSSM_ENV"] = str(self.folder / "env.sh")
        try:
            if fault:
                self.run.mkdir()
                (self.run / "fault.json").write_text(json.dumps(fault))
            self.submit(*words)
        finally:
            del self.sandbox.env["TXSSM_ENV"]

    def wait_over(self, state: str = "COMPLETED") -> None:
        """And every step was done, on the state that the one before it left."""
        super().wait_over(state)
        if state == "COMPLETED":
            assert dict(self.steps()) == losses()

    def causes(self) -> list[str | None]:
        return [attempt.cause for attempt in self.attempts()]

    def restart_count(self) -> int:
        """How often Slurm started the job again."""
        shown = self.sandbox.slurm("scontrol", "show", "job", self.job)
        return int(shown.partition("Restarts=")[2].split()[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def job(
    sandbox: Sandbox,
    data: Path,
    tmp_path: Path,
    report: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> Iterator[SupervisedJob]:
    job = SupervisedJob(sandbox, tmp_path / "job", data)
    yield job
    if (found := goodput(job.run)) and found.recoveries:
        seconds = ", ".join(f"{seconds:.1f}" for seconds in found.recoveries)
        report(f"{request.node.name}: {seconds} s to a new step, {found.repeated_steps} steps repeated")
    if job.job:
        sandbox.command("start-slurmctld")
        sandbox.slurm("scancel", "--signal=KILL", "--full", job.job) if sandbox.job_state(
            job.job
        ) == "RUNNING" else None
        sandbox.slurm("scancel", job.job)
    sandbox.mend(NODES)


def test_a_failed_worker_restarts_within_the_job(job: SupervisedJob) -> None:
    job.start(node="n2", step=25, do="kill", once=True)
    job.wait_over()
    assert job.causes() == ["killed", "finished"]
    assert job.restart_count() == 0
    first, second = job.attempts()
    assert first.action == "the trainer was restarted within the job"
    # Rank 0 saved once more, when srun told it of the other's end, or did not come to it.
    assert second.saved_before in (20, first.last_step) and second.nodes == ["n1", "n2"]


def test_without_restarts_it_is_requeued(job: SupervisedJob) -> None:
    job.start("--restarts", "0", node="n2", step=25, do="kill", once=True)
    job.wait_over()
    assert job.causes() == ["killed", "finished"] and job.restart_count() == 1


def test_a_worker_fails_while_slurmctld_is_away(job: SupervisedJob) -> None:
    job.start("--restarts", "0")
    worker = stopped_without_slurmctld(job)
    worker.kill()
    job.wait_until(lambda: "task 1: Killed" in job.output(), "the worker's end")
    # Long enough for srun and scontrol to have asked in vain.
    time.sleep(5)
    job.sandbox.must("start-slurmctld")
    job.wait_over()
    assert job.causes() == ["killed", "finished"]


def test_a_step_ends_while_slurmctld_is_away(job: SupervisedJob) -> None:
    """slurmctld may then believe in it for ever, and would let no other step start within the job."""
    job.start("--step-timeout", "60")
    stopped_without_slurmctld(job)
    job.wait_until(lambda: job.causes()[:1] == ["hung"], "the end of the step")
    job.sandbox.must("start-slurmctld")
    job.wait_over()
    assert job.causes() == ["hung", "finished"]


def stopped_without_slurmctld(job: SupervisedJob) -> psutil.Process:
    """Rank 1 is stopped, so that no step is done, before slurmctld dies; returns its process."""
    job.wait_step(5)
    worker = job.process(1)
    worker.suspend()
    job.wait_state_saved()
    job.sandbox.must("kill-slurmctld")
    return worker


def test_the_supervisor_is_killed(job: SupervisedJob) -> None:
    job.start()
    job.wait_step(25)
    # Else the steps might end before another supervisor has begun.
    job.process(1).suspend()
    job.supervisor().kill()
    job.wait_over()
    # Its steps ended with it, or two trainers would have written side by side.
    assert job.causes() == ["supervisor_killed", "finished"]
    assert job.restart_count() == 0
    assert "END supervisor: killed by signal 9" in job.output()


def test_srun_is_killed(job: SupervisedJob) -> None:
    job.start()
    job.wait_step(25)
    (srun,) = (process for process in job.supervisor().children() if process.name() == "srun")
    srun.kill()
    job.wait_over()
    # Its ranks did not end with it, or two trainers would have written side by side.
    assert job.causes() == ["srun_killed", "finished"]
    assert job.restart_count() == 0


def test_the_last_failure_of_those_allowed_ends_the_job(job: SupervisedJob) -> None:
    job.start("--restarts", "0", "--max-requeues", "0", node="n2", step=25, do="kill")
    job.wait_over("FAILED")
    # Its exit code is not taken for the end of a killed supervisor.
    assert job.causes() == ["killed"] and "END supervisor" not in job.output()


def test_a_second_job_in_the_same_folder_leaves_the_first_alone(job: SupervisedJob) -> None:
    job.start()
    job.wait_step(5)
    output = job.folder / "second.out"
    words = ["--parsable", "--nodes=1", f"--output={output}", str(job.run / "pretrain.sbatch")]
    second = job.sandbox.slurm("sbatch", *words).strip()
    job.wait_until(lambda: job.sandbox.job_state(second) == "FAILED", "the refusal")
    assert f"is in use by job {job.job}, on n[1-2]" in output.read_text()
    job.wait_over()
    assert job.causes() == ["finished"]


def test_a_node_that_kills_every_worker_is_left_out(job: SupervisedJob) -> None:
    job.start(node="n2", step=0, do="kill")
    job.wait_over()
    assert job.causes() == ["killed", "killed", "finished"]
    assert [attempt.nodes for attempt in job.attempts()] == [["n1", "n2"], ["n1", "n2"], ["n1", "n3"]]
    assert "the job was requeued without n2" in job.output()


def test_a_spare_node_takes_the_place_within_the_job(job: SupervisedJob) -> None:
    job.start("--spare", "1", node="n2", step=0, do="kill")
    job.wait_over()
    assert job.restart_count() <= 1
    assert [attempt.nodes for attempt in job.attempts()][-2:] == [["n1", "n2"], ["n1", "n3"]]


def test_a_lost_node_with_a_spare_one_costs_no_requeue(job: SupervisedJob) -> None:
    job.start("--spare", "1", node="none", step=0, do="")
    job.wait_step(25)
    job.sandbox.must("poweroff", "n2")
    job.wait_over()
    assert job.causes() == ["node_failure", "finished"] and job.restart_count() == 0
    assert job.attempts()[1].nodes == ["n1", "n3"]


def test_a_bad_node_is_left_out_at_once(job: SupervisedJob) -> None:
    job.start(node="n2", step=5, do="RuntimeError: CUDA error: uncorrectable ECC error")
    job.wait_over()
    assert [attempt.nodes for attempt in job.attempts()] == [["n1", "n2"], ["n1", "n3"]]


def test_nan_is_computed_once_more_by_other_gpus(job: SupervisedJob) -> None:
    job.start(node="n2", step=25, do="FloatingPointError: the loss of step 25 is NaN")
    job.wait_over()
    assert job.causes() == ["nan", "finished"]
    assert job.attempts()[1].nodes == ["n1", "n3"]


def test_nan_that_every_gpu_computes_ends_the_job(job: SupervisedJob) -> None:
    job.start(node="n1", step=25, do="FloatingPointError: the loss of step 25 is NaN")
    job.wait_until(lambda: len(job.attempts()) == 2 or job.causes() == ["nan"], "the first NaN")
    # Now the other first node computes it, too.
    (job.run / "fault.json").write_text(json.dumps({"node": "n2", "step": 25, "do": "FloatingPointError: NaN"}))
    job.wait_over("FAILED")
    assert job.causes() == ["nan", "nan"]
    assert "other GPUs computed it, too" in job.why()


def test_a_full_disk_holds_the_job(job: SupervisedJob) -> None:
    job.start(
        node="n1", step=25, do="RuntimeError: not written: OSError: [Errno 28] No space left on device", once=True
    )
    job.wait_until(lambda: job.restart_count() == 1 and job.sandbox.job_state(job.job) == "PENDING", "the held job")
    why = job.why()
    assert f"scontrol release {job.job}" in why and job.causes() == ["disk_full"]
    job.sandbox.slurm("scontrol", "release", job.job)
    job.wait_over()
    assert job.causes() == ["disk_full", "finished"]


def test_a_job_without_room_for_a_checkpoint_is_held_before_it_trains(job: SupervisedJob) -> None:
    checkpoints = job.run / "checkpoints"
    checkpoints.mkdir(parents=True)
    for node in NODES:
        job.sandbox.must("shell", node, "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(checkpoints))
    try:
        job.start()
        job.wait_until(lambda: job.restart_count() == 1 and job.sandbox.job_state(job.job) == "PENDING", "the held job")
    finally:
        for node in NODES:
            job.sandbox.must("shell", node, "umount", str(checkpoints))
    why = job.why()
    assert "a checkpoint takes" in why and f"scontrol release {job.job}" in why
    job.sandbox.slurm("scontrol", "release", job.job)
    job.wait_over()
    assert job.causes() == ["disk_full", "finished"]


def test_the_first_node_loses_the_runs_folder(job: SupervisedJob) -> None:
    """The supervisor's own node: it cannot even say so there."""
    job.start()
    job.wait_step(15)
    # What was open before stays open; the path leads elsewhere.
    job.sandbox.must("shell", "n1", "mount", "-t", "tmpfs", "-o", "ro", "none", str(job.run))
    try:
        job.wait_over()
    finally:
        job.sandbox.must("shell", "n1", "umount", str(job.run))
    assert job.attempts()[-1].nodes == ["n2", "n3"]


def test_a_suspended_job_is_not_ended_as_hung(job: SupervisedJob) -> None:
    """Longer than the step timeout, which the stand-in's steps are far below."""
    job.start("--step-timeout", "20")
    job.wait_step(15)
    job.sandbox.slurm("scontrol", "suspend", job.job)
    time.sleep(40)
    job.sandbox.slurm("scontrol", "resume", job.job)
    job.wait_over()
    assert job.causes() == ["finished"]


def test_a_preempted_job_starts_again_also_where_slurm_only_cancels_it(job: SupervisedJob) -> None:
    urgent = job.folder / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    job.sandbox.slurm("scontrol", "update", "PartitionName=main", "PreemptMode=CANCEL")
    try:
        job.start()
        job.wait_step(15)
        job.sandbox.slurm("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", str(urgent))
        job.wait_over()
    finally:
        job.sandbox.slurm("scontrol", "update", "PartitionName=main", "PreemptMode=REQUEUE")
    assert job.causes() == ["preempted", "finished"]
