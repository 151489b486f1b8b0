"""Shows the output of a run's newest job, or of a run on this machine, and follows it until it is over."""

import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.holders import is_held
from megatron_txssm.jobs.attempts import find_run
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.submission import read_submission

POLL_SECONDS = 1.0
# Between two queries to slurmctld.
ASK_SECONDS = 15.0
UNKNOWN = "in an unknown state"


def show_logs(
    run: str | Path, *, follow: bool = False, lines: int = 40, stage: str | None = None, rank: int | None = None
) -> int:
    """Print the end of the output of a run's newest job; of a run that was not submitted, of rank 0.

    Args:
        run: a run folder, a name under runs/, or the number of a job
        follow: also print new output until the job is over; wait for the file if it does not exist yet
        lines: how many of the existing lines to print
        stage: of a chain: pretrain, convert, evaluate or harness; None: pretrain, or the only one
        rank: print the log of this rank instead

    Returns the exit code, 0. UserError if there is no such run, job or file.
    """
    folder = find_run(run)
    if not read_submission(folder).get("jobs"):
        return _show_local(folder, lines, follow, stage, rank)
    stage, number = _job(folder, stage)
    job = Watched(number)
    path = folder / "logs" / (f"{stage}-{job.number}.out" if rank is None else f"rank_{rank}.log")
    waited = False
    while not path.is_file():
        state = job.state()
        if not follow or state is None:
            raise UserError(f"{path} does not exist (yet); {_pending(job, state)}")
        if not waited:
            print(f"{path} does not exist yet; {_pending(job, state)}", file=sys.stderr)
            waited = True
        time.sleep(POLL_SECONDS if state == "RUNNING" else ASK_SECONDS)
    _show(path, lines, job.state if follow else None)
    return 0


def _show_local(folder: Path, lines: int, follow: bool, stage: str | None, rank: int | None) -> int:
    """The same for a run that was not submitted: Slurm is not asked."""
    if stage not in (None, "pretrain"):
        raise UserError(f"{folder} has no job of stage {stage!r}: it was not submitted to Slurm")
    path = folder / "logs" / f"rank_{rank or 0}.log"
    if not path.is_file():
        known = sorted(found.name for found in path.parent.glob("rank_*.log"))
        there = f"it has {', '.join(known[:20])}" if known else "the run has not started"
        raise UserError(f"{path} does not exist; {there}")
    _show(path, lines, (lambda: "RUNNING" if is_held(folder) else None) if follow else None)
    return 0


class Watched:
    """A job whose state is polled."""

    def __init__(self, number: str):
        self.number = number
        self.answered = True

    def state(self) -> str | None:
        """PENDING, RUNNING …; None if it is over; UNKNOWN, with a message, if Slurm does not answer."""
        try:
            jobs = slurm.queue()
        except UserError as error:
            if self.answered:
                print(f"unknown whether job {self.number} has ended, still following: {error}", file=sys.stderr)
            self.answered = False
            return UNKNOWN
        self.answered = True
        return next((found.state for found in jobs if found.job_id == self.number and not found.is_over), None)


def _show(path: Path, lines: int, state: Callable[[], str | None] | None) -> None:
    """Print the last lines of a file, then everything appended until `state` is None."""
    with path.open(encoding="utf-8", errors="replace") as file:
        sys.stdout.write("".join(deque(file, max(0, lines))))
        sys.stdout.flush()
        asked = float("-inf")
        over = state is None
        while True:
            if text := file.read():
                sys.stdout.write(text)
                sys.stdout.flush()
            elif over:
                return
            else:
                if time.monotonic() - asked > ASK_SECONDS:
                    asked, over = time.monotonic(), state is None or state() is None
                time.sleep(POLL_SECONDS)


def _job(folder: Path, stage: str | None) -> tuple[str, str]:
    """A stage, by default the training or the only one, and the number of its newest job."""
    jobs = {name: ids for name, ids in read_submission(folder).get("jobs", {}).items() if ids}
    if stage is None:
        stage = next(iter(jobs)) if len(jobs) == 1 else "pretrain"
    if stage not in jobs:
        raise UserError(f"{folder} has no job of stage {stage!r}; it has {', '.join(jobs) or 'none'}")
    return stage, jobs[stage][-1]


def _pending(job: Watched, state: str | None) -> str:
    return f"job {job.number} is {'over' if state is None else state}"
