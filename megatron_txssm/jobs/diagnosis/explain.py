"""Explains why a run's last attempt ended, what the run is doing now, and what to do."""

import os
import time
from datetime import timedelta
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt, attempts, find_run, job_ids, load_run
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.diagnosis.diagnosis import close, recorded
from megatron_txssm.jobs.diagnosis.explain_evaluation import explain_evaluation, is_evaluation
from megatron_txssm.jobs.diagnosis.lost_node import reconsider
from megatron_txssm.jobs.diagnosis.remedies import what_to_do
from megatron_txssm.jobs.diagnosis.stages import end_of, last_words, other_stages
from megatron_txssm.jobs.goodput import explain_goodput, slowness
from megatron_txssm.jobs.run_jobs import jobs_of, known_jobs, seconds_since_step, who_trains
from megatron_txssm.metrics import current_step
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.waiting import what_it_waits_for
from megatron_txssm.training.guard.spike_documents import explain_spikes
from megatron_txssm.training.launch.ended import explain_local_end
from megatron_txssm.training.launch.preflight import is_finished, saved_step
from megatron_txssm.training.watch.collective_trace import explain_hang


def explain(run: str | Path, *, every_attempt: bool = False) -> int:
    """Print why a run's last attempt ended, where its checkpoints are, what its jobs do now, and what to do.

    Args:
        run: a run folder, a name under runs/, or the number of one of its jobs; also the folder of an evaluation that
            was submitted
        every_attempt: print one line for every attempt that has ended, instead of the last one's details

    Returns the exit code, 0. UserError if there is no such run, or if its records cannot be read.
    """
    folder = find_run(run)
    if is_evaluation(folder):
        return _explain_evaluation(folder)
    recipe, found = load_run(folder), attempts(folder)
    queue, no_answer = _ask(folder, bool(found or known_jobs(folder) or any(folder.glob("*.sbatch"))))
    jobs = None if queue is None else [job for job in jobs_of(folder, queue) if not _is_other_stage(job, folder)]
    # An attempt without a recorded end may still run; otherwise it was killed before it could record one.
    last = found[-1] if found and recorded(found[-1]) is None else None
    running = "" if last is None else _why_it_may_run(folder, last, jobs)
    ended = found[:-1] if running else found
    if ended and (recorded(ended[-1]) is None or ended[-1].ended is None):
        if recorded(ended[-1]) is None:
            close(ended[-1], recipe)
        # `close` records the present time; the supervisor was killed earlier.
        ended[-1].ended = _last_sign(ended[-1])
    # Slurm may have noticed a lost node after the record was written.
    reconsider(ended, ask=queue is not None)
    if every_attempt:
        for number, attempt in enumerate(ended, 1):
            print(f"{_line(attempt)}{_afterwards(attempt, ended[number:])}")
    elif ended:
        _explain(ended[-1], recipe, folder, jobs)
    elif not jobs and not running and (known := list(explain_local_end(folder))):
        return _explain_local_run(folder, recipe, known)
    else:
        print(f"{folder}: no attempt has ended yet")
        if jobs == []:
            _print("last output", _last_words(folder))
    _explain_spikes(folder, recipe)
    for stage in other_stages(folder, recipe, queue):
        _print(stage.name, stage.state)
        _print("  output", str(stage.output or ""))
        _print("  what to do", stage.todo)
    if last is not None and running:
        _print("now", f"attempt {last.number} of job {last.job_id} {running}: {_progress(recipe, folder)}")
    _explain_now(folder, recipe, jobs, no_answer, runs=bool(running), has_ended=bool(ended))
    return 0


def _explain_evaluation(folder: Path) -> int:
    queue, no_answer = _ask(folder, is_slurms=True)
    print(f"{folder}: a submitted evaluation")
    for name, text in explain_evaluation(folder, queue):
        _print(name, text)
    _print("Slurm", no_answer)
    return 0


def _explain_now(
    folder: Path, recipe: Recipe, jobs: list[slurm.Job] | None, no_answer: str, runs: bool, has_ended: bool
) -> None:
    """Print what the run's jobs do, and its goodput. `runs`, `has_ended`: whether an attempt runs, or has ended."""
    for job in jobs or ():
        _print("now", _now(job))
        _print("what to do", what_it_waits_for(job) if job.state == "PENDING" and not has_ended else "")
    if no_answer:
        _print("Slurm", no_answer)
    elif not jobs and not runs:
        _print("now", "finished" if is_finished(recipe) else "no job of this run is pending or running")
    _print("slow", slowness(folder / "metrics.jsonl") if runs else "")
    for name, text in explain_goodput(folder, jobs[0].state if jobs else None):
        _print(name, text)


def _ask(folder: Path, is_slurms: bool) -> tuple[list[slurm.Job] | None, str]:
    """The queue; None and the reason if Slurm does not answer. Not asked about a run that was not submitted to it."""
    if not is_slurms:
        return [], ""
    try:
        return slurm.queue(), ""
    except UserError as error:
        return None, str(error)


def _is_other_stage(job: slurm.Job, folder: Path) -> bool:
    later = ("convert", "evaluate", "harness")
    return job.job_id.partition("_")[0] in job_ids(folder, but="pretrain") or job.script.stem in later


def _why_it_may_run(folder: Path, attempt: Attempt, jobs: list[slurm.Job] | None) -> str:
    """Why an attempt without a recorded end runs, or may run; empty if it has ended."""
    job = next((job for job in jobs or () if job.job_id == attempt.job_id), None)
    if job is not None:
        return f"is {job.state} on {job.nodes}" if job.runs else ""
    if holder := who_trains(folder):
        return f"trains, although Slurm does not show its job ({holder})" if jobs is not None else f"trains ({holder})"
    return "" if jobs is not None else "may run or have ended: the process in running.json gives no heartbeat"


def _last_sign(attempt: Attempt) -> float:
    """When an attempt last wrote something, in seconds since the epoch."""
    files = [attempt.run / "metrics.jsonl", Path(attempt.output or "")]
    written = [file.stat().st_mtime for file in files if os.path.isfile(file)]
    return max([attempt.started, *written])


def _explain(attempt: Attempt, recipe: Recipe, folder: Path, jobs: list[slurm.Job] | None) -> None:
    diagnosis = recorded(attempt)
    assert diagnosis is not None and attempt.ended is not None
    duration = timedelta(seconds=round(attempt.ended - attempt.started))
    print(f"{folder}: attempt {attempt.number} (job {attempt.job_id}) ended after {duration}: {diagnosis.summary}")
    if diagnosis.rank is not None:
        _print("first failure", f"rank {diagnosis.rank} on {diagnosis.node}")
        _print("log", str(folder / "logs" / f"rank_{diagnosis.rank}.log"))
    elif diagnosis.node is not None:
        _print("node", diagnosis.node)
    _print("details", diagnosis.detail)
    for text in explain_hang(attempt.folder, len(attempt.nodes) * attempt.nproc_per_node):
        _print("collectives", text)
    _print("last step", f"{attempt.last_step or 0} of {recipe.train_iters}")
    _print("checkpoint", _newest(recipe, attempt.saved_after))
    was_requeued = attempt.action.startswith("the job was requeued")
    lost = ", but Slurm no longer has such a job" if was_requeued and jobs == [] else ""
    _print("what was done", f"{attempt.action}{lost}")
    if jobs == [] and (words := _last_words(folder)).startswith("error:"):
        _print("last output", words)
    _print("what to do", what_to_do(attempt, recipe, folder, jobs))


def _explain_local_run(folder: Path, recipe: Recipe, known: list[tuple[str, str]]) -> int:
    print(f"{folder}: a run without Slurm")
    for name, text in known:
        _print(name, text)
    _print("last step", f"{current_step(folder / 'metrics.jsonl') or 0} of {recipe.train_iters}")
    _print("checkpoint", _newest(recipe, saved_step(recipe.checkpoint_path)))
    _explain_spikes(folder, recipe)
    # If the run trains, the first line has said so.
    _print("now", "" if known[0][0] == "training now" else _local_state(recipe))
    return 0


def _explain_spikes(folder: Path, recipe: Recipe) -> None:
    for name, text in explain_spikes(folder, recipe):
        _print(name, text)


def _newest(recipe: Recipe, saved: int | None) -> str:
    return "none" if saved is None else f"step {saved} in {recipe.checkpoint_path}"


def _local_state(recipe: Recipe) -> str:
    return "finished" if is_finished(recipe) else "not running; the command that started it resumes it"


def _progress(recipe: Recipe, folder: Path) -> str:
    seconds = seconds_since_step(folder)
    ago = "" if seconds is None else f", {seconds:.0f} s ago"
    return f"step {current_step(folder / 'metrics.jsonl') or 0} of {recipe.train_iters}{ago}"


def _now(job: slurm.Job) -> str:
    place = f"({job.reason})" if job.state == "PENDING" else f"on {job.nodes}"
    return f"job {job.job_id} is {job.state} {place}"


def _last_words(folder: Path) -> str:
    """The newest output's last line: of a job that ended before its first attempt, or could not be requeued."""
    outputs = sorted(folder.glob("logs/pretrain-*.out"), key=lambda path: path.stat().st_mtime)
    return last_words(end_of(outputs[-1]) or "") if outputs else ""


def _line(attempt: Attempt) -> str:
    begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.started))
    steps = "" if attempt.last_step is None else f"to step {attempt.last_step}"
    end = recorded(attempt) or "its end was not recorded"
    return f"{attempt.number:4}  {begin}  job {attempt.job_id}  {steps:14}  {end}"


def _afterwards(attempt: Attempt, later: list[Attempt]) -> str:
    """What later attempts show about a non-finite result."""
    if attempt.cause != Cause.NAN or attempt.node is None:
        return ""
    without = (other for other in later if attempt.node not in other.nodes)
    if any((other.last_step or 0) > (attempt.last_step or 0) for other in without):
        return f"; without {attempt.node} it did not happen again: have its GPUs tested (dcgmi diag -r 3)"
    return ""


def _print(name: str, text: str) -> None:
    if text:
        print(f"  {name:14} {text}")
