"""Finds a run's jobs in the queue, and the process that trains in its folder, known to Slurm or not."""

import contextlib
import tempfile
import time
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.holders import NAME, STALE_SECONDS, Holder, living_holder
from megatron_txssm.jobs.attempts import attempts, job_ids
from megatron_txssm.slurm.client import Job, NoAnswer, queue
from megatron_txssm.typed_json import read_json


def jobs_of(run: Path, queue: list[Job]) -> list[Job]:
    """A run's unfinished jobs: of its last submission, of others from the same folder, and those queued by hand."""
    folder, known = run.resolve(), known_jobs(run)
    return [job for job in queue if not job.is_over and _is_of(job, folder, known)]


def _is_of(job: Job, folder: Path, known: set[str]) -> bool:
    place = job.script.parent
    if place.resolve() == folder:
        return True
    # Job numbers are reused on other clusters and after years, so a job whose script lies in another run folder is that
    # run's. Scripts of shards lie elsewhere.
    return job.job_id.partition("_")[0] in known and not (place / "submission.json").is_file()


def known_jobs(run: Path) -> set[str]:
    """Job numbers of the last submission, the last attempt (its script may lie anywhere) and the present trainer."""
    known = set(job_ids(run))
    with contextlib.suppress(UserError):
        known |= {attempt.job_id for attempt in attempts(run)[-1:]}
    return known | _job_in_running_json(run)


def _job_in_running_json(run: Path) -> set[str]:
    """The job number in running.json; empty without one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        job_id = read_json(run / NAME).get("job_id")
        return set() if job_id is None else {str(job_id)}
    return set()


def who_trains(run: Path) -> str | None:
    """The process that trains in a run folder, according to its heartbeat in running.json; None without a heartbeat.

    Takes up to a minute if the process died less than a minute ago.
    """
    now = _file_server_time(run)
    with contextlib.suppress(OSError):
        if now is not None and now - (run / NAME).stat().st_mtime > STALE_SECONDS:
            return None
    holder = living_holder(run, Holder.myself())
    return None if holder is None else str(holder)


def check_no_other_job(run: Path, job_id: str) -> None:
    """UserError if another job runs in a run folder: its attempt is open, or its rank 0 is in running.json.

    The ranks' own lock detects a trainer without a job, or while slurmctld is down.
    """
    others = {attempt.job_id for attempt in attempts(run) if attempt.cause is None}
    others |= _job_in_running_json(run)
    if not others - {job_id}:
        return
    with contextlib.suppress(NoAnswer):
        for job in queue():
            if job.runs and job.job_id in others - {job_id}:
                raise UserError(
                    f"{run} is in use by job {job.job_id}, on {job.nodes}; wait for its end, or: scancel {job.job_id}"
                )


def _file_server_time(run: Path) -> float | None:
    """The file server's clock, in seconds since the epoch; None if the folder is not writable."""
    try:
        with tempfile.NamedTemporaryFile(dir=run) as file:
            return Path(file.name).stat().st_mtime
    except OSError:
        return None


def seconds_since_step(run: Path) -> float | None:
    """Seconds since metrics.jsonl grew; None if it does not exist."""
    try:
        touched = (run / "metrics.jsonl").stat().st_mtime
    except OSError:
        return None
    return max(0.0, (_file_server_time(run) or time.time()) - touched)


def as_typed(folder: Path) -> str:
    """A folder as typed on a command line: relative to the current folder if it lies in it."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
