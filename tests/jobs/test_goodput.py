"""Goodput of constructed attempts; every expected number is worked out by hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.jobs.goodput import WITHIN_JOB, explain_goodput, goodput, print_goodput
from megatron_txssm.jobs.listing import list_jobs
from tests.jobs.some_attempt import some_attempt
from tests.slurm.some_queue import write_queue


def do_steps(run: Path, first: int, last: int, at: float, seconds: float = 10.0, **fields: Any) -> None:
    """Steps of `seconds` each, the first of which ends at `at`."""
    with (run / "metrics.jsonl").open("a") as file:
        for number, step in enumerate(range(first, last + 1)):
            line = {"iteration": step, "grad_norm": 1.0, "step_seconds": seconds, "time": at + number * seconds}
            file.write(json.dumps(line | fields) + "\n")


def note_start(run: Path, began: float) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 0, "start": {"world_size": 2}, "began": began}) + "\n")


def attempt(run: Path, number: int, started: float, ended: float | None, **fields: Any) -> None:
    metrics = run / "metrics.jsonl"
    offset = metrics.stat().st_size if metrics.exists() else 0
    cause = None if ended is None else "failed"
    fields = {"exit_code": 1, "cause": cause} | fields
    some_attempt(run, number, started=started, ended=ended, metrics_offset=offset, **fields).save()


def submitted(run: Path, seconds: float, job: str = "21") -> None:
    import datetime

    text = datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
    record = {"submitted": text, "jobs": {"pretrain": [job]}}
    (run / "submission.json").write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "big"
    run.mkdir(parents=True)
    return run


def test_faults_cost_what_they_cost(run: Path) -> None:
    """Submitted at 0, began at 100; failed at 400, requeued; failed at 800, started again within the job; finished."""
    submitted(run, 0)
    attempt(run, 1, 100, 400)
    do_steps(run, 1, 20, 210)  # 210 … 400, the first begins at 200
    (run / "metrics.jsonl").open("a").write('{"iteration": 20, "validation lm loss": 1.0, "time": 401}\n{"iterat')
    (run / "metrics.jsonl").open("a").write("\n")
    attempt(run, 2, 460, 800, action=f"the trainer was started again {WITHIN_JOB}")
    do_steps(run, 11, 30, 560)  # 560 … 750; step 21 at 660
    attempt(run, 3, 803, 1100)
    do_steps(run, 26, 45, 870)  # 870 … 1060; step 31 at 920
    found = goodput(run)
    assert found is not None
    assert (found.steps, found.repeated_steps, found.attempts) == (45, 15, 3)
    assert (found.wall, found.active, found.repeated) == (1100, 450, 150)
    # 100 before the first, 60 before the second; within the job nothing.
    assert found.queue == 160
    # 200-100, 550-460, 860-803
    assert found.start == 247
    assert found.other == 1100 - 450 - 150 - 160 - 247
    # From 400 to 660, from 800 to 920.
    assert found.recoveries == [260, 120] and found.recovery == 190
    assert dict(explain_goodput(run, None)) == {
        "goodput": "40.9% of 0:18:20 in steps that count (typical: 97%)",
        "recovery": "0:03:10 (2) (typical: < 4 min)",
        "steps lost": "15 of 45 repeated (0:02:30)",
        "time": "in the queue 0:02:40, starts 0:04:07, saves and the rest 0:01:33",
    }


def test_attempts_that_came_no_further_are_part_of_one_recovery(run: Path) -> None:
    attempt(run, 1, 0, 100)
    do_steps(run, 1, 5, 60)
    attempt(run, 2, 150, 160)
    attempt(run, 3, 200, 300)
    do_steps(run, 3, 5, 250)
    attempt(run, 4, 350, None, cause=None, exit_code=None)
    do_steps(run, 4, 7, 400)
    found = goodput(run, "RUNNING", now=500)
    assert found is not None
    # From the end of the first, at 100, to step 6 at 420.
    assert found.recoveries == [320]
    assert found.wall == 500


def test_a_run_that_went_on_without_slurm(run: Path) -> None:
    submitted(run, 0)
    attempt(run, 1, 10, 100)
    note_start(run, 12)
    do_steps(run, 1, 5, 60)
    note_start(run, 200)
    do_steps(run, 6, 7, 230)
    found = goodput(run)
    assert found is not None
    # 10 before the first attempt, and 100 in which the run was stopped; killed, it ended with its last step.
    assert (found.attempts, found.wall, found.active, found.queue, found.recoveries) == (2, 240, 70, 110, [130])
    # And back on Slurm.
    attempt(run, 2, 300, 400)
    do_steps(run, 8, 9, 330)
    found = goodput(run)
    assert found is not None
    assert (found.attempts, found.wall, found.active, found.queue, found.recoveries) == (3, 400, 90, 170, [130, 90])


def test_lines_without_numbers_are_left_out(run: Path) -> None:
    attempt(run, 1, 0, 100)
    do_steps(run, 1, 2, 50)
    mistakes: list[dict[str, Any]]
    mistakes = [{"iteration": "x"}, {"time": None}, {"step_seconds": float("nan")}, {"consumed_tokens": "x"}]
    for wrong in mistakes:
        do_steps(run, 3, 3, 70, **wrong)
    found = goodput(run)
    assert found is not None and (found.steps, found.active) == (2, 20)


def test_a_step_that_was_done_twice_counts_as_it_was_done_last(run: Path) -> None:
    attempt(run, 1, 0, 100)
    do_steps(run, 1, 2, 50, seconds=7)
    attempt(run, 2, 100, 200)
    do_steps(run, 2, 2, 150, seconds=20)
    found = goodput(run)
    assert found is not None and (found.active, found.repeated) == (27, 7)


@pytest.mark.parametrize(("state", "wall", "queue"), [(None, 100, 0), ("PENDING", 700, 600), ("RUNNING", 700, 0)])
def test_time_goes_on_while_the_job_is_in_the_queue(run: Path, state: str | None, wall: int, queue: int) -> None:
    attempt(run, 1, 0, 100)
    do_steps(run, 1, 5, 60)
    found = goodput(run, state, now=700)
    assert found is not None and (found.wall, found.queue) == (wall, queue)


def test_a_supervisor_that_died_ended_with_its_last_line(run: Path) -> None:
    """The next one closed its record, hours later."""
    attempt(run, 1, 0, 9000, exit_code=None, cause="node_failure")
    do_steps(run, 1, 5, 60)  # … 100
    attempt(run, 2, 9000, 9200)
    do_steps(run, 6, 7, 9100)
    found = goodput(run)
    assert found is not None and (found.queue, found.recoveries) == (8900, [9000])


def test_without_a_submission_of_its_own_the_first_start_counts(run: Path) -> None:
    submitted(run, 0, job="99")
    attempt(run, 1, 100, 200)
    do_steps(run, 1, 2, 150)
    found = goodput(run)
    assert found is not None and (found.wall, found.queue) == (100, 0)


def test_lines_of_an_earlier_version_have_no_times(run: Path) -> None:
    attempt(run, 1, 0, 100)
    lines = [
        {"iteration": step, "grad_norm": 1.0, "tokens_per_second": 50.0, "consumed_tokens": 400 * step}
        for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attempt(run, 2, 150, 250)
    do_steps(run, 3, 4, 200, seconds=5)
    found = goodput(run)
    assert found is not None
    # 400 tokens at 50 a second; step 3 was done again.
    assert (found.active, found.repeated, found.repeated_steps) == (26, 8, 1)
    told = dict(explain_goodput(run, None))
    assert told["recovery"] == "unknown (typical: < 4 min)"
    assert told["time"] == "in the queue 0:00:50"


def test_before_the_first_attempt_there_is_nothing_to_say(run: Path) -> None:
    assert goodput(run) is None
    assert list(explain_goodput(run, "PENDING")) == []


def test_an_attempt_without_a_step(run: Path) -> None:
    attempt(run, 1, 0, 60)
    found = goodput(run)
    assert found is not None
    assert (found.active_share, found.recovery, found.start) == (0, None, 60)
    assert "none needed" in dict(explain_goodput(run, None))["recovery"]


def test_all_runs_here_and_in_the_queue(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(run, 1, 0, 100)
    do_steps(run, 1, 8, 30)
    elsewhere = tmp_path / "scratch" / "far"
    elsewhere.mkdir(parents=True)
    submitted(elsewhere, 0)
    attempt(elsewhere, 1, 0, 100)
    (tmp_path / "runs" / "new").mkdir()
    tools = tmp_path / "tools"
    tools.mkdir()
    write_queue(tools, {"job_id": "21", "command": str(elsewhere / "pretrain.sbatch")})
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    assert print_goodput() == 0
    header, big, far, field = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "active", "recovery", "steps", "lost", "in", "queue", "wall", "attempts"]
    assert big.split() == ["runs/big", "80.0%", "none", "needed", "0", "of", "8", "0:00:00", "0:01:40", "1"]
    assert far.split()[:2] == ["scratch/far", "0.0%"]
    assert field == "Typical in the field: 97% active, recovery (median) < 4 min."


def test_without_slurm_the_runs_here_are_shown(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert print_goodput() == 0
    assert capsys.readouterr().out == "no run has started\n"
    attempt(run, 1, 0, 100)
    assert print_goodput() == 0
    said = capsys.readouterr()
    assert "runs/big" in said.out and "warning: there is no squeue" in said.err


def test_jobs_shows_that_a_run_is_slow(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(run, 0)
    slow = {"fraction": 0.314, "reason": "the others wait for rank 3 on n2", "ranks": [3], "nodes": ["n2"]}
    do_steps(run, 1, 8, 30, slow=slow)
    write_queue(tmp_path, {"job_id": "21", "command": str(run / "pretrain.sbatch")})
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert list_jobs() == 0
    words = "8 of ?, slow: 31% of its median throughput: the others wait for rank 3 on n2"
    assert words in capsys.readouterr().out
    do_steps(run, 9, 9, 130)
    assert list_jobs() == 0
    assert "slow" not in capsys.readouterr().out
