"""Explains the job of an evaluation that `txssm eval harness --submit` queued, by its submission.json and its log."""

import time
from collections.abc import Iterator
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.diagnosis.remedies import submit_again
from megatron_txssm.jobs.diagnosis.stages import stage_of_job
from megatron_txssm.slurm.client import Job
from megatron_txssm.slurm.submission import read_submission


def is_evaluation(folder: Path) -> bool:
    """Whether a folder that `attempts.find_run` found holds no run, but the job of an evaluation."""
    return not (folder / "recipe.yaml").is_file() and "pretrain" not in read_submission(folder).get("jobs", {})


def explain_evaluation(folder: Path, queue: list[Job] | None) -> Iterator[tuple[str, str]]:
    """Lines for the user: a name, and what is said of it; `queue`: None if Slurm does not answer.

    UserError if submission.json names no job.
    """
    submission = read_submission(folder)
    jobs = [(name, ids[-1]) for name, ids in submission.get("jobs", {}).items() if ids]
    if not jobs:
        raise UserError(f"{folder / 'submission.json'} names no job, and there is no recipe.yaml; name another folder")
    yield "of", submission.get("recipe", "")
    yield "submitted", submission.get("submitted", "")
    for name, job_id in jobs:
        stage = stage_of_job(folder, name, job_id, queue, submit_again(folder))
        yield name, stage.state
        yield "output", str(stage.output or "")
        yield "responses", _responses(folder)
        yield "results", ", ".join(map(str, sorted(folder.glob("*/results.json"))))
        yield "what to do", stage.todo


def _responses(folder: Path) -> str:
    """What the newest evaluation in the folder has: it goes on with it."""
    files = [(file.stat().st_mtime, file) for file in folder.glob("*/responses.jsonl")]
    if not files:
        return ""
    touched, newest = max(files)
    with newest.open("rb") as lines:
        batches = sum(1 for _ in lines)
    return f"{batches:,} batches in {newest}, the last {max(0.0, time.time() - touched):,.0f} s ago; they are kept"
