"""txssm why: why a run's last attempt ended, and what to do."""

import argparse
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_txssm.cli import add_verb
from megatron_txssm.errors import UserError
from megatron_txssm.launch import slurm
from megatron_txssm.launch.diagnosis import close, recorded
from megatron_txssm.launch.local_end import explain_local_end
from megatron_txssm.launch.preflight import is_finished, saved_step
from megatron_txssm.launch.run_folder import Attempt, attempts, current_step, find_run
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe

EXAMPLES = ("txssm why runs/transxssm_1.3b", "txssm why 17", "txssm why transxssm_1.3b --all")


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "why", EXAMPLES)
    parser.add_argument("run", help="a run folder, a name under runs/, or the number of one of its jobs")
    parser.add_argument("--all", action="store_true", help="one line for every attempt")


def run(args: argparse.Namespace) -> int:
    folder = find_run(args.run)
    recipe, found = load_recipe(folder / "recipe.yaml"), attempts(folder)
    job = _job(folder)
    # The last may still run. One whose job is not running was killed before it could say why.
    running = job is not None and job.state in ("RUNNING", "COMPLETING") and found and recorded(found[-1]) is None
    ended = found[:-1] if running else found
    if ended and recorded(ended[-1]) is None:
        close(ended[-1], recipe)
    if args.all:
        for attempt in ended:
            print(_line(attempt))
    elif ended:
        _explain(ended[-1], recipe)
    elif job is None and (known := list(explain_local_end(folder))):
        print(f"{folder}: a run without Slurm")
        for name, text in known:
            _print(name, text)
        _print("last step", f"{current_step(folder / 'metrics.jsonl') or 0} of {recipe.train_iters}")
        _print("checkpoint", _newest(recipe, saved_step(recipe.checkpoint_path)))
        # Of a run that trains, the first line has said so.
        _print("now", "" if known[0][0] == "it trains now" else _local_state(recipe))
        return 0
    else:
        print(f"{folder}: no attempt has ended yet")
        if job is None:
            _print("last words", _last_words(folder))
    _print("now", _now(recipe, job, found[-1] if running else None))
    return 0


def _explain(attempt: Attempt, recipe: Recipe) -> None:
    diagnosis = recorded(attempt)
    assert diagnosis is not None and attempt.ended is not None
    duration = timedelta(seconds=round(attempt.ended - attempt.started))
    print(f"{attempt.run}: attempt {attempt.number} (job {attempt.job_id}) ended after {duration}: {diagnosis.summary}")
    if diagnosis.rank is not None:
        _print("first failure", f"rank {diagnosis.rank} on {diagnosis.node}")
        _print("its log", str(attempt.run / "logs" / f"rank_{diagnosis.rank}.log"))
    elif diagnosis.node is not None:
        _print("node", diagnosis.node)
    _print("what exactly", diagnosis.detail)
    _print("last step", f"{attempt.last_step or 0} of {recipe.train_iters}")
    _print("checkpoint", _newest(recipe, attempt.saved_after))
    _print("what was done", attempt.action)
    _print("what to do", diagnosis.remedy)


def _newest(recipe: Recipe, saved: int | None) -> str:
    return "none" if saved is None else f"step {saved} in {recipe.checkpoint_path}"


def _local_state(recipe: Recipe) -> str:
    return "finished" if is_finished(recipe) else "it does not run; the command that started it resumes it"


def _now(recipe: Recipe, job: slurm.Job | None, running: Attempt | None) -> str:
    if job is None:
        return "finished" if is_finished(recipe) else "no job of this run is pending or running"
    if job.state == "PENDING":
        return f"job {job.job_id} is PENDING ({job.reason})"
    if running is None:
        return f"job {job.job_id} is {job.state} on {job.nodes}"
    metrics = recipe.run_path / "metrics.jsonl"
    ago = f", {time.time() - metrics.stat().st_mtime:.0f} s ago" if metrics.exists() else ""
    return (
        f"attempt {running.number} of job {job.job_id} is {job.state} on {job.nodes}: "
        f"step {current_step(metrics) or 0} of {recipe.train_iters}{ago}"
    )


def _job(folder: Path) -> slurm.Job | None:
    """The run's pretraining job in the queue; None where there is none, or no Slurm."""
    script = folder.resolve() / "pretrain.sbatch"
    try:
        return next((job for job in slurm.queue() if job.script == script and not job.is_over), None)
    except UserError:
        return None


def _last_words(folder: Path) -> str:
    """Of a job that ended before its first attempt began."""
    outputs = sorted(folder.glob("logs/pretrain-*.out"), key=lambda path: path.stat().st_mtime)
    lines = outputs[-1].read_text(errors="replace").splitlines() if outputs else []
    return lines[-1] if lines else ""


def _line(attempt: Attempt) -> str:
    begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.started))
    steps = "" if attempt.last_step is None else f"to step {attempt.last_step}"
    return f"{attempt.number:4}  {begin}  job {attempt.job_id}  {steps:14}  {recorded(attempt)}"


def _print(name: str, text: str) -> None:
    if text:
        print(f"  {name:14} {text}")
