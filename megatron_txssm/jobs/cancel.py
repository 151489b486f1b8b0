"""Cancels a run's jobs; the trainer finishes its step and saves in the time that Slurm grants."""

import re
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import attempts, find_run, job_ids
from megatron_txssm.jobs.run_jobs import jobs_of
from megatron_txssm.slurm import client as slurm

# scancel's messages about a job that has already ended.
_GONE = re.compile(r"Invalid job id|already completing or completed", re.IGNORECASE)


def cancel(run: str | Path) -> int:
    """Cancel a run's pending and running jobs; `run`: its folder, its name under runs/, or a job number.

    Returns the exit code, 0, also if no such job is left. UserError if a job could not be cancelled, if Slurm does
    not answer, or if the run was not submitted to Slurm.
    """
    folder = find_run(run)
    jobs = jobs_of(folder, _queue(folder))
    if not jobs and not _is_slurms(folder):
        raise UserError(
            f"{folder} was not submitted to Slurm; Ctrl-C in its terminal, or SIGTERM, lets it save and stop"
        )
    if not jobs:
        print(f"{folder} has no job that is pending or running")
        return 0
    # Dependent jobs first: the end of the job before them would start them.
    failures = [failure for job in reversed(jobs) if (failure := _cancel(job))]
    if failures:
        raise UserError(f"{len(failures)} of {len(jobs)} jobs were not cancelled: {'; '.join(failures)}")
    return 0


def _queue(folder: Path) -> list[slurm.Job]:
    try:
        return slurm.queue()
    except slurm.NoAnswer as error:
        raise UserError(f"no job of {folder} was cancelled: {error}") from None
    except UserError:
        # Without Slurm, a local run has no jobs.
        if _is_slurms(folder):
            raise
        return []


def _is_slurms(folder: Path) -> bool:
    return bool(job_ids(folder) or attempts(folder))


def _cancel(job: slurm.Job) -> str:
    """Cancel a job; returns the reason if that failed, empty if it is cancelled or has ended."""
    try:
        slurm.run_slurm("scancel", job.job_id)
    except UserError as error:
        if not _GONE.search(str(error)):
            return str(error)
        print(f"job {job.job_id} ({job.name}) has already ended")
        return ""
    print(f"cancelled job {job.job_id} ({job.name}, {job.state})")
    return ""
