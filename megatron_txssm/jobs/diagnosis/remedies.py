"""What to do about an attempt's end, given its job's present state: commands, ready to be typed."""

import os
import shlex
from pathlib import Path

from megatron_txssm.checkpoint.steps import saved_step, whole_steps
from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.diagnosis.causes import remedy
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm.client import Job
from megatron_txssm.slurm.submission import read_submission
from megatron_txssm.slurm.waiting import needs_somebody, what_it_waits_for

# Causes that need no repair: the job restarts by itself, or by a command.
_NOTHING_TO_MEND = {
    *(Cause.TIME_LIMIT, Cause.PREEMPTED, Cause.NODE_FAILURE, Cause.REQUEUED, Cause.CANCELLED, Cause.STEP_CANCELLED),
    *(Cause.STOPPED, Cause.MEGATRON_EXIT),
}


def what_to_do(attempt: Attempt, recipe: Recipe, run: Path, jobs: list[Job] | None) -> str:
    """What to do about an attempt's end. `jobs`: the run's queued training jobs, None if Slurm does not answer."""
    cause = attempt.cause
    assert cause is not None
    if cause == Cause.FINISHED:
        return ""
    mend = go_back(attempt.detail, recipe, run) if cause == Cause.NAN else remedy(cause, attempt.detail)
    if jobs is None:
        return mend
    if jobs:
        if needs_somebody(jobs[0]):
            return f"{'' if cause in _NOTHING_TO_MEND else f'{mend}; '}{what_it_waits_for(jobs[0])}"
        return f"nothing: job {jobs[0].job_id} continues by itself" if cause in _NOTHING_TO_MEND else mend
    again = submit_again(run)
    if cause == Cause.PREEMPTED:
        return f"Slurm did not restart it (PreemptMode=CANCEL, or --no-requeue); submit it again: {again}"
    if cause in _NOTHING_TO_MEND:
        return f"submit it again to continue from its checkpoint: {again}"
    return mend if cause == Cause.NAN else f"{mend}; submit it again: {again}"


def submit_again(run: Path, *changes: str) -> str:
    """The command that submits a run again; `changes`: options to add."""
    submission = read_submission(run)
    words = " ".join(["", *changes]) if changes else ""
    if command := submission.get("command"):
        place = submission.get("directory")
        there = f"cd {shlex.quote(place)} && " if place and place != os.getcwd() else ""
        return f"{there}{command}{words}"
    return f"txssm submit {shlex.quote(str(run / 'recipe.yaml'))} --nodes N{words}"


def go_back(detail: str, recipe: Recipe, run: Path) -> str:
    """What to do if weights or gradients are not finite."""
    if (said := detail.find("The last sound checkpoint")) >= 0:
        # The trainer has checked the weights.
        return detail[said:]
    newest = saved_step(recipe.checkpoint_path)
    rate = recipe.optimizer.learning_rate / 2
    changes = (f"--set optimizer.learning_rate={rate:g}", "--set optimizer.schedule_at_resume=recipe")
    lower = f"try a lower rate, from there or an older step: {submit_again(run, *changes)}"
    if newest is None:
        return f"there is no checkpoint; {lower.replace('from there or an older step', 'from the beginning')}"
    tracker = recipe.checkpoint_path / "latest_checkpointed_iteration.txt"
    older = [step.number for step in whole_steps(recipe.checkpoint_path) if step.number < newest]
    back = f"; to go back to step {older[0]}: echo {older[0]} > {shlex.quote(str(tracker))}" if older else ""
    return f"the last sound step is {newest}{back}; {lower}"
