"""Lists runs, on Slurm or not: state, step, loss, throughput, time left, size on disk."""

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from megatron_txssm.errors import UserError, shown
from megatron_txssm.holders import is_held
from megatron_txssm.jobs.attempts import attempts, load_run
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.goodput import slowness
from megatron_txssm.jobs.run_jobs import jobs_of
from megatron_txssm.metrics import MetricsLine, metrics_tail
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm import client as slurm
from megatron_txssm.terminal import compact, print_table, progress_bar
from megatron_txssm.training.launch.ended import local_end
from megatron_txssm.training.launch.preflight import is_finished

# One of them makes a folder a run.
_MARKS = ("recipe.yaml", "metrics.jsonl", "submission.json")
# Folders of runs may be divided once or twice, as in runs/sweep/lr_3e-4.
_DEPTH = 3
# For the sizes of all runs: a large one has millions of files.
SIZE_SECONDS = 5.0
_STOPPED = {Cause.FINISHED, Cause.TIME_LIMIT, Cause.PREEMPTED, Cause.CANCELLED, Cause.STOPPED, Cause.MEGATRON_EXIT}


def list_runs(folder: str | Path = "runs") -> int:
    """Print a table of the runs in a folder, or of one run; returns the exit code, 0.

    UserError if the folder does not exist. A run that cannot be read has its own line, with the reason.
    """
    top = Path(folder)
    if not top.is_dir():
        raise UserError(f"{shown(str(folder))} is not a folder; name one that holds runs: txssm runs FOLDER")
    found = sorted(run_folders(top))
    if not found:
        print(f"no runs in {top}")
        return 0
    queue, rows, spent = ask_queue(found), [], 0.0
    with progress_bar("reading runs", len(found)) as advance:
        for count, run in enumerate(found, 1):
            *row, note = _row(run, queue)
            # What small runs leave of their share of the time, the later ones have.
            began = time.monotonic()
            size = _size(run, began + SIZE_SECONDS * count / len(found) - spent)
            spent += time.monotonic() - began
            rows.append((str(run if run == top else run.relative_to(top)), *row, size, note))
            advance(1)
    print_table(("run", "state", ">step", ">loss", ">tokens/s", ">time left", ">size", "note"), rows)
    if any(row[1] == "failed" for row in rows):
        print("`txssm why RUN` explains why a run ended.")
    return 0


def run_folders(top: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The runs in a folder and its folders; a run's own folders are not searched."""
    marks = [mark for mark in _MARKS if (top / mark).exists()]
    if marks == ["recipe.yaml"]:
        # A run that has not begun, or a recipe beside the runs that it made.
        yield from list(_inner_runs(top, depth)) or [top]
    elif marks:
        yield top
    else:
        yield from _inner_runs(top, depth)


def _inner_runs(top: Path, depth: int) -> Iterator[Path]:
    if depth > 0:
        try:
            inner = [Path(entry) for entry in os.scandir(top) if entry.is_dir(follow_symlinks=depth == _DEPTH)]
        except OSError:
            return
        # Beside checkpoints lies the recipe that made them.
        for folder in inner:
            if folder.name != "checkpoints":
                yield from run_folders(folder, depth - 1)


class Progress(NamedTuple):
    """A run's last step, from the end of metrics.jsonl."""

    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    # Per step, with validations and saves; None before the second step of an attempt.
    seconds: float | None = None
    # Seconds since the epoch.
    time: float | None = None


def progress(run: Path) -> Progress:
    """OSError if metrics.jsonl cannot be read."""
    lines = [line for line in reversed(metrics_tail(run / "metrics.jsonl")) if isinstance(line.get("iteration"), int)]
    of_attempt = [line for line in takewhile(lambda line: "start" not in line, lines) if "grad_norm" in line]
    if not of_attempt:
        return Progress()
    last, first = of_attempt[0], of_attempt[-1]
    return Progress(
        last["iteration"], last.get("lm loss"), last.get("tokens_per_second"), _pace(first, last), last.get("time")
    )


def state(run: Path, recipe: Recipe, step: int, queue: list[slurm.Job] | None) -> str:
    """running, queued, finished, stopped (it can be resumed), failed, or not started. `queue`: None if unknown."""
    jobs = [job for job in jobs_of(run, queue or []) if job.script.stem == "pretrain"]
    if is_held(run) or any(job.runs for job in jobs):
        return "running"
    if jobs:
        return "queued"
    if is_finished(recipe) or step >= recipe.train_iters:
        return "finished"
    here, on_slurm = local_end(run), attempts(run)[-1:]
    if here is not None and (not on_slurm or here.ended > on_slurm[0].started):
        # Signals, which stop a run, end it with 128 and their number.
        return "stopped" if here.exit_code == 0 or here.exit_code >= 128 else "failed"
    if on_slurm:
        return "stopped" if on_slurm[0].cause in _STOPPED else "failed"
    return "failed" if step or any(run.glob("logs/rank_*.log")) else "not started"


def _row(run: Path, queue: list[slurm.Job] | None) -> tuple[str, ...]:
    """All columns but name and size, the note last."""
    try:
        recipe, now = load_run(run), progress(run)
        found = state(run, recipe, now.step, queue)
        slow = slowness(run / "metrics.jsonl") if found == "running" else ""
    except (UserError, OSError, ValueError, TypeError, KeyError) as error:
        return "broken", "", "", "", "", str(error)
    left = ""
    if found == "running" and now.seconds is not None:
        since = max(0.0, time.time() - (now.time or 0.0))
        left = str(timedelta(seconds=round(max(0.0, (recipe.train_iters - now.step) * now.seconds - since))))
    return (
        found,
        f"{now.step}/{recipe.train_iters}",
        "" if now.loss is None else f"{now.loss:.3f}",
        "" if now.tokens_per_second is None else compact(now.tokens_per_second),
        left,
        f"slow: {slow}" if slow else "",
    )


def _pace(first: MetricsLine, last: MetricsLine) -> float | None:
    steps = last["iteration"] - first["iteration"]
    return (last["time"] - first["time"]) / steps if steps > 0 and "time" in first and "time" in last else None


def ask_queue(runs: list[Path]) -> list[slurm.Job] | None:
    """Slurm is asked only if one of the runs was submitted to it."""
    if not any((run / "submission.json").exists() for run in runs):
        return []
    try:
        return slurm.queue()
    except UserError as error:
        print(f"Slurm does not answer, so queued runs are not shown as such: {error}")
        return None


def _size(run: Path, deadline: float) -> str:
    """Bytes on disk; `>` before what was counted by the deadline (by time.monotonic)."""
    total = 0
    for where, _, names in os.walk(run):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:
                # It has vanished: the run may be saving.
                continue
        if time.monotonic() > deadline:
            return f">{compact(total)}B"
    return f"{compact(total)}B"
