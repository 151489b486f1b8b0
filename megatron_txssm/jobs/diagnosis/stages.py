"""The state of jobs without attempts: a chain's other stages, before and after the training, and an evaluation's."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.diagnosis.causes import CAUSES, shortened
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm.client import Job
from megatron_txssm.slurm.submission import read_submission
from megatron_txssm.slurm.waiting import what_it_waits_for
from megatron_txssm.slurm.words import job_was_cancelled, why_slurm_ended_it

# Bytes read from the end of an output, where a failed stage prints its reason.
_END_BYTES = 65_536
# Lines that entrypoint.sh, srun and slurmstepd print around a stage's own output.
_AROUND = re.compile(r"^(?:\d{4}-\d\d-\d\dT[\d:]+ (?:START|END|requeueing) |srun: |slurmstepd|\[[\dT:.-]+\] error: )")
_END = re.compile(r"^\S+ END \w+: exit code (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Stage:
    """One stage of a run's last submission."""

    name: str
    # "job 18 is PENDING (Dependency)", "job 18 failed (exit code 1): …"
    state: str
    # Its output file; None if it does not exist.
    output: Path | None = None
    # What to do; empty if that is unknown, or nothing.
    todo: str = ""


def other_stages(run: Path, recipe: Recipe, queue: list[Job] | None) -> Iterator[Stage]:
    """All stages except the training, in order; `queue` is None if Slurm does not answer."""
    submission = read_submission(run)
    before = ""
    for name, ids in submission.get("jobs", {}).items():
        if name == "shard":
            yield _shards(recipe, ids, queue, f"cd {submission.get('directory')} && {submission.get('command')}")
        elif name != "pretrain":
            yield stage_of_job(run, name, ids[-1], queue, f"sbatch {run}/{name}.sbatch", before)
        before = name


def stage_of_job(folder: Path, name: str, job_id: str, queue: list[Job] | None, again: str, before: str = "") -> Stage:
    """The state of a job whose script and log are in `folder`, by the queue and its log.

    queue: None if Slurm does not answer. again: the command that queues it again. before: the stage that it waits for.
    """
    output = folder / "logs" / f"{name}-{job_id}.out"
    text = _last_start(output, name)
    shown = output if text is not None else None
    if job := next((job for job in queue or [] if job.job_id == job_id and not job.is_over), None):
        return Stage(name, _in_queue(job), shown, what_it_waits_for(job) if job.state == "PENDING" else "")
    if text is not None and (end := _END.search(text)):
        if end[1] == "0":
            return Stage(name, f"job {job_id} is finished", shown)
        state = f"job {job_id} failed (exit code {end[1]}): {last_words(text)}"
        return Stage(name, state, shown, f"fix the cause, then: {again}")
    if queue is None:
        return Stage(name, f"job {job_id}: unknown, since Slurm does not answer", shown)
    if text is None and before:
        state = f"job {job_id} never started: Slurm removed it since {before} did not succeed, or somebody cancelled it"
        return Stage(name, state, None, f"when {before} has succeeded: {again}")
    if text is None:
        return Stage(name, f"job {job_id} never started: somebody cancelled it, or Slurm lost it", None, again)
    return Stage(name, f"job {job_id} ended: {_why(text)}", shown, again)


def _shards(recipe: Recipe, ids: list[str], queue: list[Job] | None, again: str) -> Stage:
    """The shard stage: job arrays whose tasks each have an output file in the corpus's folder."""
    here = ", ".join(ids)
    queued = [job for job in queue or [] if job.job_id.partition("_")[0] in ids and not job.is_over]
    outputs = [path for of in ids for path in Path(recipe.data.corpus or "").glob(f"logs/*/slurm_logs/{of}_*.out")]
    texts = {path: _last_start(path, "shard") or "" for path in sorted(outputs)}
    ends = {path: end[1] for path, text in texts.items() if (end := _END.search(text))}
    failed = [path for path, code in ends.items() if code != "0"]
    state = f"job {here}: {len(ends) - len(failed)} tasks are finished, {len(failed)} failed"
    if queued:
        waiting = next((job for job in queued if job.state == "PENDING"), None)
        state += f", {len(queued)} wait or run"
        if not failed:
            return Stage("shard", state, None, what_it_waits_for(waiting) if waiting else "")
    elif queue is None:
        state += "; Slurm does not answer"
    unended = [] if queued or queue is None else [path for path in texts if path not in ends]
    if first := next(iter(failed or unended), None):
        words = last_words(texts[first]) if failed else _why(texts[first])
        return Stage("shard", f"{state}; {first.stem}: {words}", first, f"fix it; finished tasks are kept: {again}")
    if not outputs and queue is not None and not queued:
        return Stage("shard", f"job {here} never started: somebody cancelled it", None, again)
    return Stage("shard", state)


def _in_queue(job: Job) -> str:
    reason = f" ({job.reason})" if job.state == "PENDING" else f" on {job.nodes}"
    return f"job {job.job_id} is {job.state}{reason}"


def _why(text: str) -> str:
    """Why a job ended, if it did not report that itself."""
    if ended := why_slurm_ended_it(text):
        return CAUSES[Cause(ended[0])].summary
    if job_was_cancelled(text):
        return CAUSES[Cause.CANCELLED].summary
    words = last_words(text)
    return f"the reason is unknown{f'; its last output: {words}' if words else ''}"


def _last_start(output: Path, name: str) -> str | None:
    """A stage's output since its last start; None if there is no output."""
    text = end_of(output)
    return None if text is None else re.split(rf"^\S+ START {name}: ", text, flags=re.MULTILINE)[-1]


def end_of(output: Path) -> str | None:
    """The last `_END_BYTES` of a file, decoded; None if it cannot be read."""
    try:
        with output.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return None


def last_words(text: str) -> str:
    """The last line that the program itself printed."""
    lines = (line.strip() for line in reversed(text.splitlines()))
    return shortened(next((line for line in lines if line and not _AROUND.match(line)), ""), 400)
