"""Lists this user's Slurm jobs, and the progress of their runs."""

import time
from datetime import timedelta
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.goodput import slowness
from megatron_txssm.jobs.run_jobs import as_typed
from megatron_txssm.metrics import current_step
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.waiting import needs_somebody, what_it_waits_for
from megatron_txssm.terminal import print_table


def list_jobs() -> int:
    """Print a table of this user's unfinished jobs, and what to do about those that wait for a person.

    Returns the exit code, 0. UserError if Slurm does not answer.
    """
    jobs = [job for job in slurm.queue() if not job.is_over]
    if not jobs:
        print("no jobs")
        return 0
    print_table(("job", "state", "run", "step", "time left", "nodes", ">attempt", "name"), map(_row, jobs))
    for job in filter(needs_somebody, jobs):
        print(f"job {job.job_id}: {what_it_waits_for(job)}")
    return 0


def _row(job: slurm.Job) -> tuple[str, ...]:
    folder = job.script.parent
    ours = (folder / "submission.json").is_file()
    return (
        job.job_id,
        f"{job.state} ({job.reason})" if job.state == "PENDING" else job.state,
        as_typed(folder) if ours else "",
        _step(folder) if ours and job.script.stem == "pretrain" else "",
        _time_left(job),
        job.nodes,
        str(sum(1 for _ in folder.glob("attempts/*/attempt.json")) or "") if ours else "",
        job.name,
    )


def _time_left(job: slurm.Job) -> str:
    if job.state != "RUNNING" or not job.end_time:
        return ""
    return str(timedelta(seconds=max(0, job.end_time - round(time.time()))))


def _step(run: Path) -> str:
    try:
        total = f"{load_recipe(run / 'recipe.yaml').train_iters:,}"
    except UserError:
        total = "?"
    slow = slowness(run / "metrics.jsonl")
    return f"{current_step(run / 'metrics.jsonl') or 0:,} of {total}{', slow: ' if slow else ''}{slow}"
