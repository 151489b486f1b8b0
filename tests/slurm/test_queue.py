"""What Slurm is asked, and how its answers are read; the answers are those of Slurm 22.05."""

import os
from pathlib import Path

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.slurm import client as slurm
from tests.slurm.some_queue import LETTERS, write_queue


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stand-in for squeue, first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_only_the_users_own_jobs_are_asked_for_in_a_format_of_ours(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a user's .bashrc may hold would leave jobs out, and change the times.
    for name, value in (("SQUEUE_STATES", "RUNNING"), ("SQUEUE_FORMAT", "%i"), ("SLURM_TIME_FORMAT", "relative")):
        monkeypatch.setenv(name, value)
    write_queue(cluster)
    assert slurm.queue() == []
    words = (cluster / "squeue.args").read_text().rstrip("\n").split("\n")
    assert "--me" in words and "--json" not in words
    assert words[-1] == "--format=\x1e" + "\x1f".join(LETTERS.values())
    variables = (cluster / "squeue.env").read_text().splitlines()
    assert "SLURM_TIME_FORMAT=%s" in variables and not [line for line in variables if line.startswith("SQUEUE_")]


def test_every_field_of_a_job(cluster: Path) -> None:
    job = {"job_id": 17, "name": "a|b  c,日", "state": "RUNNING", "nodes": "n[1-2]", "excluded": "n3"}
    write_queue(cluster, job | {"command": "/runs/a b/pretrain.sbatch", "end_time": 1795662822})
    assert slurm.queue() == [
        slurm.Job(
            job_id="17",
            name="a|b  c,日",
            state="RUNNING",
            reason="None",
            nodes="n[1-2]",
            partition="main",
            script=Path("/runs/a b/pretrain.sbatch"),
            excluded="n3",
            end_time=1795662822,
        )
    ]


def test_jobs_stand_in_the_order_of_their_numbers(cluster: Path) -> None:
    numbers = ["100", "99", "9_10", "9_2", "9_[11-20%4]", "1000"]
    write_queue(cluster, *({"job_id": number} for number in numbers))
    assert [job.job_id for job in slurm.queue()] == ["9", "9_2", "9_10", "99", "100", "1000"]


def test_a_pending_job_has_no_end_and_one_of_wrap_no_script(cluster: Path) -> None:
    write_queue(cluster, {"job_id": 4, "state": "PENDING", "command": "(null)"})
    (job,) = slurm.queue()
    assert job.end_time == 0 and job.script == Path()


def test_a_name_that_is_no_text(cluster: Path) -> None:
    write_queue(cluster, {"job_id": 4, "name": "x"})
    queue = cluster / "queue"
    queue.write_bytes(queue.read_bytes().replace(b"\x1fx\x1f", b"\x1f\xff\n\x1f"))
    assert slurm.queue()[0].name == "\ufffd\n"


def test_the_script_without_its_arguments_and_where_it_lies(cluster: Path) -> None:
    # Slurm 22.05 shows arguments, 24.11 does not; each shows a relative path as it was typed.
    run = cluster / "a run"
    run.mkdir()
    (run / "pretrain.sbatch").touch()
    scripts = {
        f"{run}/pretrain.sbatch recipes/a b/c.yaml --set x=/y": run / "pretrain.sbatch",
        f"{run}/pretrain.sbatch": run / "pretrain.sbatch",
        "./pretrain.sbatch": run / "pretrain.sbatch",
        "pretrain.sbatch --set x=y": run / "pretrain.sbatch",
        # Gone, or on another machine.
        "/elsewhere/pretrain.sbatch": Path("/elsewhere/pretrain.sbatch"),
    }
    for command, script in scripts.items():
        write_queue(cluster, {"job_id": 4, "command": command, "folder": str(run)})
        assert slurm.queue()[0].script == script


@pytest.mark.parametrize("state", ["PREEMPTED", "REVOKED", "TIMEOUT", "COMPLETED", "OUT_OF_MEMORY", "DEADLINE"])
def test_a_job_that_is_over(cluster: Path, state: str) -> None:
    write_queue(cluster, {"job_id": 4, "state": state})
    assert slurm.queue()[0].is_over and not slurm.queue()[0].runs


@pytest.mark.parametrize("state", ["COMPLETING", "CONFIGURING", "RUNNING", "SUSPENDED", "SIGNALING", "STOPPED"])
def test_a_job_that_has_its_nodes(cluster: Path, state: str) -> None:
    write_queue(cluster, {"job_id": 4, "state": state})
    assert slurm.queue()[0].runs and not slurm.queue()[0].is_over


# As Slurm 22.05, 24.11 and 26.05 say it with slurmctld killed, but for the last ones: too busy, or just going down.
AWAY = [
    ("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"),
    ("scancel", "scancel: error: Kill job error on job id 28: Unable to contact slurm controller (connect failure)"),
    ("scontrol", "Unexpected message received for job 28"),
    ("sinfo", "slurm_load_partitions: Socket timed out on send/recv operation"),
    ("squeue", "slurm_load_jobs error: Zero Bytes were transmitted or received"),
]


@pytest.mark.parametrize(("name", "said"), AWAY)
def test_slurm_does_not_answer(cluster: Path, name: str, said: str) -> None:
    (cluster / name).write_text(f"#!/bin/bash\necho '{said}' >&2\nexit 1\n")
    (cluster / name).chmod(0o755)
    with pytest.raises(slurm.NoAnswer) as error:
        slurm.run_slurm(name)
    assert said in str(error.value) and "try again when `scontrol ping`" in str(error.value)


@pytest.mark.parametrize("said", ["Invalid job id specified", "Access/permission denied", "Invalid user id"])
def test_a_refusal_is_an_answer(cluster: Path, said: str) -> None:
    (cluster / "scancel").write_text(f"#!/bin/bash\necho 'scancel: error: {said}' >&2\nexit 1\n")
    (cluster / "scancel").chmod(0o755)
    with pytest.raises(UserError, match=said) as error:
        slurm.run_slurm("scancel", "17")
    assert not isinstance(error.value, slurm.NoAnswer)


def test_txssm_jobs(cluster: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cluster)
    run = cluster / "runs" / "demo"
    (run / "attempts" / "0001").mkdir(parents=True)
    (run / "attempts" / "0001" / "attempt.json").touch()
    (run / "submission.json").write_text("{}")
    write_queue(
        cluster,
        {"job_id": 100, "state": "PENDING", "reason": "Priority", "nodes": ""},
        {"job_id": 99, "command": str(run / "pretrain.sbatch"), "name": "demo-pretrain"},
    )
    assert main(["jobs"]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["99", "RUNNING", "runs/demo", "0", "of", "?", "n1", "1", "demo-pretrain"]
    assert second.split() == ["100", "PENDING", "(Priority)", "x"]
    write_queue(cluster)
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out == "no jobs\n"


@pytest.mark.parametrize(
    ("start", "now", "asked"),
    # Extended or shortened since; no answer; unknown at the start.
    [("1000", 5000, 5000), ("5000", 1000, 1000), ("1000", None, 1000), ("", 5000, 5000), ("", None, float("inf"))],
)
def test_a_time_limit_may_change_after_the_start(
    cluster: Path, monkeypatch: pytest.MonkeyPatch, start: str, now: int | None, asked: float
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", start)
    write_queue(cluster, *([] if now is None else [{"job_id": "16", "end_time": 7}, {"job_id": "17", "end_time": now}]))
    assert slurm.time_limit_of("17") == asked
    if start:
        (cluster / "squeue.args").unlink()
        assert slurm.time_limit_of("17", at_start=True) == float(start)
        assert not (cluster / "squeue.args").exists()
