"""The job of an evaluation: how it is queued, and why, cancel and logs of its folder, with stand-ins for Slurm."""

import json
import os
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.files import alone_in
from megatron_txssm.jobs.evaluation_job import submit_evaluation
from megatron_txssm.jobs.limits import Limits
from megatron_txssm.jobs.submission.request import Request
from tests.jobs.stand_in_slurm import AWAY, away, output, told, write_command
from tests.slurm.some_queue import write_queue

COMMAND = "txssm eval harness runs/demo --submit --nodes 1 --nproc-per-node 1"


@pytest.fixture
def folder(cluster: Path, tmp_path: Path) -> Path:
    """Of an evaluation that was queued as job 17."""
    write_command(cluster, "sbatch", f'echo "$@" >>{cluster}/sbatched; echo 17')
    folder = tmp_path / "runs" / "demo" / "evaluation" / "harness"
    assert submit(folder) == 0
    return folder


def submit(folder: Path) -> int:
    request = Request("runs/demo", 1, nproc_per_node=1, limits=Limits(stop_before=1))
    return submit_evaluation("harness", request, lambda processes: (folder, ["runs/demo"]), COMMAND)


def test_why_names_the_job_and_what_the_queue_knows_of_it(
    cluster: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queued = {"job_id": 17, "state": "PENDING", "reason": "Priority", "nodes": "", "command": f"{folder}/x.sbatch"}
    write_queue(cluster, queued)
    capsys.readouterr()
    why = told(capsys, "why", str(folder))
    assert f"{folder}: a submitted evaluation\n  of             runs/demo\n" in why
    assert (
        "harness        job 17 is PENDING (Priority)\n" in why
        and "what to do     nothing: other jobs come first" in why
    )
    write_queue(cluster, queued | {"state": "RUNNING", "nodes": "n1"})
    (folder / "logs" / "harness-17.out").write_text(output("harness", None, "loading tasks"))
    (folder / "step_2-abc").mkdir()
    (folder / "step_2-abc" / "responses.jsonl").write_text("{}\n{}\n")
    why = told(capsys, "why", "17")
    assert "job 17 is RUNNING on n1" in why and "what to do" not in why
    assert f"2 batches in {folder.relative_to(Path.cwd())}/step_2-abc/responses.jsonl" in why


@pytest.mark.parametrize(
    ("log", "said", "todo"),
    [
        (None, "job 17 never started: somebody cancelled it", COMMAND),
        ((0, "a table"), "job 17 is finished", None),
        (
            (2, "error: --tasks x: no"),
            "job 17 failed (exit code 2): error: --tasks x: no",
            f"fix the cause, then: {COMMAND}",
        ),
        (
            (None, "error: *** JOB 17 ON n1 CANCELLED AT 2026-11-26T06:36:16 DUE TO TIME LIMIT ***"),
            "time limit",
            COMMAND,
        ),
        ((None, "halfway"), "job 17 ended: the reason is unknown; its last output: halfway", COMMAND),
    ],
)
def test_why_tells_the_end_of_a_job_and_what_to_do(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    log: tuple[int | None, str] | None,
    said: str,
    todo: str | None,
) -> None:
    if log is not None:
        code, line = log
        place = "" if code is not None or "error" not in line else "slurmstepd-n1: "
        (folder / "logs" / "harness-17.out").write_text(output("harness", code, f"{place}{line}"))
    capsys.readouterr()
    why = told(capsys, "why", str(folder))
    assert said in why and ("what to do" in why) == (todo is not None)
    assert todo is None or f"what to do     {todo}\n" in why
    # From another folder, the command is run where it was given.
    os.chdir(folder)
    assert todo is None or f"cd {folder.parents[3]} && {COMMAND}\n" in told(capsys, "why", str(folder))


def test_why_while_slurm_does_not_answer(cluster: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    away(cluster)
    capsys.readouterr()
    why = told(capsys, "why", str(folder))
    assert "job 17: unknown, since Slurm does not answer" in why and AWAY in why
    (folder / "submission.json").write_text("{}")
    assert "submission.json names no job" in told(capsys, "why", str(folder), code=2)


def test_logs_and_cancel(cluster: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "logs" / "harness-17.out").write_text("some output\n")
    capsys.readouterr()
    assert told(capsys, "logs", str(folder)) == "some output\n"
    assert "has no job of stage 'convert'; it has harness" in told(
        capsys, "logs", str(folder), "--stage", "convert", code=2
    )
    assert "has no job that is pending or running" in told(capsys, "cancel", str(folder))
    write_queue(cluster, {"job_id": 17, "command": f"{folder}/harness.sbatch"}, {"job_id": 18, "command": "/other"})
    assert "cancelled job 17" in told(capsys, "cancel", "17")
    assert (cluster / "cancelled").read_text().split() == ["17"]


def test_one_submission_at_a_time(cluster: Path, folder: Path) -> None:
    with alone_in(folder, "--output"), pytest.raises(UserError, match="another process writes into"):
        submit(folder)
    write_queue(cluster, {"job_id": 17, "command": f"{folder}/harness.sbatch"})
    with pytest.raises(UserError, match=r"harness already has job 17 \(RUNNING\); wait for its end"):
        submit(folder)
    queued = [line for line in (cluster / "sbatched").read_text().splitlines() if "--parsable" in line]
    assert len(queued) == 1


def test_a_job_that_cannot_be_recorded_is_cancelled(cluster: Path, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    # A rename does not replace a folder.
    (other / "submission.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"other cannot be written: Is a directory; name a folder with --output"):
        submit(other)
    assert (cluster / "cancelled").read_text().split() == ["17"]
    assert len((cluster / "sbatched").read_text().splitlines()) == 4, "each was checked, then queued"


def test_a_runs_own_folder_is_refused(cluster: Path, folder: Path, tmp_path: Path) -> None:
    """Its submission.json is that of its training."""
    run = tmp_path / "runs" / "demo"
    (run / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"demo is a run's folder; name another with --output"):
        submit(run)
    assert not (run / "submission.json").exists() and len((cluster / "sbatched").read_text().splitlines()) == 2
    assert json.loads((folder / "submission.json").read_text())["jobs"] == {"harness": ["17"]}
