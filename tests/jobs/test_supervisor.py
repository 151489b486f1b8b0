"""What the supervisor does before its first attempt: whose records are unreadable, who trains there already."""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.jobs import attempts
from megatron_txssm.jobs.diagnosis import lost_node
from megatron_txssm.jobs.diagnosis.diagnosis import Diagnosis
from megatron_txssm.jobs.limits import Limits
from megatron_txssm.jobs.supervisor import supervisor, unfit_node
from megatron_txssm.jobs.supervisor.decision import Decision, decide, idle_attempts
from megatron_txssm.jobs.supervisor.settings import Settings, parse_settings
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.slurm.nodes import Node
from megatron_txssm.training.launch.run_lock import RunLock
from tests.jobs.some_attempt import some_attempt
from tests.slurm.some_queue import write_queue


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder with an attempt of job 16 that nobody has closed; this process is job 17, the queue is empty."""
    commands = tmp_path / "bin"
    commands.mkdir()
    write_queue(commands)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    recipe = load_recipe("demo_cpu", [f"run_directory={tmp_path}"])
    (tmp_path / "recipe.yaml").write_text(recipe.frozen(tmp_path))
    folder = tmp_path / "attempts" / "0001"
    folder.mkdir(parents=True)
    fields = {"job_id": "16", "nodes": ["n1"], "nproc_per_node": 1, "started": 1.0}
    (folder / "attempt.json").write_text(json.dumps(fields))
    for name, value in {"JOB_ID": "17", "JOB_NODELIST": socket.gethostname(), "JOB_PARTITION": "main"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "9999999999")
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def test_the_record_of_a_job_that_trains_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "attempts" / "0001" / "attempt.json").read_bytes()
    with RunLock(load_recipe(str(run / "recipe.yaml"))):
        assert supervisor.main([str(run / "recipe.yaml")]) == 2
    assert "is in use by another run" in capsys.readouterr().err
    assert (run / "attempts" / "0001" / "attempt.json").read_bytes() == before
    assert len(list((run / "attempts").iterdir())) == 1


@pytest.mark.parametrize(("number", "lost"), [(30, True), (5, True), (116, True), (13, False), (28, False)])
def test_checkpoints_on_a_file_system_that_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, lost: bool
) -> None:
    """Beside a run folder that is sound. Missing rights, or room, are its user's to mend."""

    def fails(**_: Any) -> Any:
        raise OSError(number, "")

    unfit_node.check_checkpoints(tmp_path / "not yet there")
    monkeypatch.setattr(unfit_node.tempfile, "TemporaryFile", fails)
    with pytest.raises(OSError, match=f"Errno {number}") if lost else contextlib.nullcontext():
        unfit_node.check_checkpoints(tmp_path)


def test_records_that_a_node_cannot_read_are_its_fault(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Requeued(Exception):
        pass

    def leave_node(folder: Path, error: OSError) -> Any:
        raise Requeued(folder, error.strerror)

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(supervisor, "leave_node", leave_node)
    monkeypatch.setattr(attempts, "read_json", fails)
    with pytest.raises(Requeued, match="Input/output error"):
        supervisor.main([str(run / "recipe.yaml")])


@pytest.mark.parametrize(
    ("reason", "wanted"), [("", None), (" DUE TO TIME LIMIT", "requeue"), (" DUE TO PREEMPTION", "requeue")]
)
def test_a_signal_that_comes_while_it_waits_for_slurm_is_obeyed(
    run: Path, monkeypatch: pytest.MonkeyPatch, reason: str, wanted: str | None
) -> None:
    """A restart would end at once, and nobody would know why; a requeue would revive what was cancelled."""
    output = run / "job.out"
    output.write_text(f"slurmstepd-n1: error: *** JOB 17 ON n1 CANCELLED AT 2026-11-26T12:00:00{reason} ***\n")
    attempt = some_attempt(run, cause="killed", job_id="17", output=str(output), last_step=15)
    decisions = supervisor_of(run)
    decide = decisions._decide

    def wait(job_id: str) -> bool:
        decisions.told_to_stop = True
        return True

    monkeypatch.setattr(supervisor, "lost_nodes", lambda nodes: [])
    monkeypatch.setattr(supervisor, "end_leftover_steps", wait)
    decision = decide(attempt, Diagnosis("killed"), [], 3)
    assert (decision and decision.do) == wanted


def test_a_step_out_of_slurms_sight_is_a_reason_to_requeue(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks may live on beside those of a restart."""
    attempt = some_attempt(run, cause="killed", job_id="17", last_step=15)
    decisions = supervisor_of(run)
    monkeypatch.setattr(supervisor, "lost_nodes", lambda nodes: [])
    for gone, lost_step, wanted in ((True, False, "restart"), (False, False, "requeue"), (True, True, "requeue")):
        monkeypatch.setattr(supervisor, "end_leftover_steps", lambda job_id, gone=gone: gone)
        decisions.lost_step = lost_step
        decision = decisions._decide(attempt, Diagnosis("killed"), [], 3)
        assert decision is not None and decision.do == wanted


@pytest.mark.parametrize(
    ("before", "wanted"), [([], Decision("requeue")), (["n2"], Decision("requeue", leave_out=("n2",)))]
)
def test_a_node_that_slurm_misses_while_the_step_ends_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, before: list[str], wanted: Decision
) -> None:
    """And excluded, if it is blamed for the second time; the job's other node is too few for a restart."""
    states = [Node("n1", "alloc", "", None), Node("n2", "alloc", "", None)]

    def end_leftover_steps(job_id: str) -> bool:
        states[1] = Node("n2", "down*", "Not responding", time.time())
        return True

    monkeypatch.setattr(lost_node, "node_states", lambda names: [node for node in states if node.name in names])
    monkeypatch.setattr(supervisor, "end_leftover_steps", end_leftover_steps)
    monkeypatch.setattr(supervisor, "requeue_without", lambda job, leave_out, *_: Decision("requeue", "", leave_out))
    old = [some_attempt(run, 2, cause="node_failure", job_id="17", node=node, last_step=12) for node in before]
    attempt = some_attempt(
        run, 3, cause="connection_lost", job_id="17", rank=0, node="n1", last_step=15, ended=time.time()
    )
    decisions = supervisor_of(run)
    assert decisions._decide(attempt, Diagnosis("connection_lost"), old, 3) == wanted
    saved = attempts.attempts(run)[-1]
    assert (saved.number, saved.cause, saved.node) == (3, "node_failure", "n2")


def test_what_the_preflight_said_is_not_the_trainers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of it may fail without consequences, on a spare node or in measuring the network."""
    output = run / "job.out"
    attempt = some_attempt(run, output=str(output))

    class Preflight:
        port = 1

        def __init__(self, *_: Any) -> None: ...

        def run(self) -> dict[str, list[str]]:
            output.write_text("srun: error: n1: task 0: Exited with exit code 1\n")
            return {}

    trains = supervisor_of(run)
    monkeypatch.setattr(supervisor, "NodePreflight", Preflight)
    monkeypatch.setattr(trains, "_step_command", lambda nodes: ["true"])
    trains._train(attempt)
    assert attempt.exit_code == 0 and attempt.read_output() == ""


@pytest.mark.parametrize(
    ("job", "output", "cause", "node"),
    [
        ("17", "", "node_failure", "n1"),
        ("17", "END supervisor: killed by signal 9\n", "supervisor_killed", None),
        # Another job's may have ended in any way: its output went elsewhere.
        ("16", "", "unknown", None),
    ],
)
def test_a_job_that_slurm_started_again_without_a_reason_had_lost_its_first_node(
    run: Path, monkeypatch: pytest.MonkeyPatch, job: str, output: str, cause: str, node: str | None
) -> None:
    """An unplugged node reports nothing, and may be back before anybody asks for it."""
    (run / "job.out").write_text(output)
    some_attempt(run, job_id=job, output=str(run / "job.out")).save()
    monkeypatch.setattr(supervisor, "end_leftover_steps", lambda job_id: True)
    supervisor_of(run)._close_last_attempt()
    [closed] = attempts.attempts(run)
    assert (closed.cause, closed.node) == (cause, node)


def test_attempts_of_other_versions_are_closed_and_counted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "end_leftover_steps", lambda job_id: True)
    for number, cause in enumerate(("meteorite_strike", None), 2):
        some_attempt(run, number, job_id="17", cause=cause).save()
        path = run / "attempts" / f"{number:04d}" / "attempt.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 7}))
    made = supervisor_of(run)
    made._close_last_attempt()
    *before, last = attempts.attempts(run)
    assert (last.cause, last.node) == ("node_failure", "n1")
    # Both made no progress.
    assert idle_attempts([*before, last], "17") == 2
    assert decide(last, before, max_requeues=10, restarts=3, nodes=["n1", "n2"]) == Decision("requeue")


def test_the_command_line_of_the_batch_script_is_read_back() -> None:
    settings = Settings("a b.yaml", ("x=$y", "data.train=[]"), nodes=2, limits=Limits(*range(1, 8)))
    assert parse_settings(settings.words) == settings
    assert parse_settings(["demo_cpu"]) == Settings("demo_cpu")


def supervisor_of(run: Path) -> supervisor.Supervisor:
    made = supervisor.Supervisor(Settings(str(run / "recipe.yaml")))
    made.nodes = ["n1", "n2"]
    return made
