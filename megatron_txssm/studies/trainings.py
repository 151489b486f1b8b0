"""Trains a study's runs, several at once, each by `txssm pretrain` in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from megatron_txssm.files import unwound_by_signals
from megatron_txssm.holders import is_held
from megatron_txssm.process_tree import signal_descendants
from megatron_txssm.studies.study import StudyRun
from megatron_txssm.terminal import progress_bar
from megatron_txssm.training.launch.ended import local_end

PRETRAIN = (sys.executable, "-m", "megatron_txssm.cli", "pretrain")
_POLL_SECONDS = 0.5


@unwound_by_signals()
def train(what: str, runs: Sequence[StudyRun], *, parallel: int = 1, may_diverge: bool = False) -> list[StudyRun]:
    """Train the runs that are not finished, `parallel` at once, from their checkpoints; returns those that failed.

    may_diverge: a run that has diverged counts as finished, and is not trained again.

    A run that another process trains, as after a kill of this one alone, is waited for. On Ctrl-C, SIGTERM and a
    hang-up the runs finish their step and save; the second time they are killed.
    """

    def is_over(run: StudyRun) -> bool:
        return run.is_finished or (may_diverge and run.has_diverged)

    waiting = [run for run in runs if not is_over(run)]
    steps = sum(run.recipe.train_iters - run.steps_done for run in waiting)
    print(f"{what}: {len(runs) - len(waiting)} of {len(runs)} runs are finished, {steps:,} steps to go", flush=True)
    active: list[_Training] = []
    failed: list[StudyRun] = []
    began, done, ended = time.monotonic(), 0, len(runs) - len(waiting)
    try:
        with progress_bar(f"{what}: steps", steps) as advance:
            while waiting or active:
                while waiting and len(active) < parallel:
                    active.append(_Training(waiting.pop(0), parallel))
                time.sleep(_POLL_SECONDS)
                for training in tuple(active):
                    # In this order: a run may end in between.
                    has_ended, new = training.has_ended(), training.new_steps()
                    done += new
                    advance(new)
                    if has_ended:
                        active.remove(training)
                        ended += 1
                        left = (time.monotonic() - began) * (steps - done) / max(done, 1)
                        print(f"{training.outcome()}; {ended} of {len(runs)} runs{_left(left, done)}", flush=True)
                        failed += [] if is_over(training.run) else [training.run]
    except BaseException:
        _stop(active)
        raise
    return failed


class _Training:
    """A run in training, by a process of this study or another's."""

    def __init__(self, run: StudyRun, parallel: int):
        self.run, self.steps = run, run.steps_done
        # None: another process trains it.
        self.process = None if is_held(run.path) else _start(run, parallel)

    def has_ended(self) -> bool:
        return not is_held(self.run.path) if self.process is None else self.process.poll() is not None

    def new_steps(self) -> int:
        """Since the last call."""
        before, self.steps = self.steps, max(self.steps, self.run.steps_done)
        return self.steps - before

    def outcome(self) -> str:
        """What became of it, once it has ended."""
        if self.run.is_finished:
            return f"{self.run.path.name}: finished"
        end = local_end(self.run.path)
        what = "it ended without a message" if end is None else end.what
        how = "diverged" if self.run.has_diverged else "failed"
        return f"{self.run.path.name}: {how} at step {self.steps}: {what} (output: {_output(self.run)})"


def _start(run: StudyRun, parallel: int) -> "subprocess.Popen[bytes]":
    """Train with this run's share of the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // parallel)
    _output(run).parent.mkdir(exist_ok=True)
    with _output(run).open("ab") as output:
        return subprocess.Popen(
            [*PRETRAIN, str(run.path / "recipe.yaml")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            # A terminal's Ctrl-C must only reach this process, which stops the others in order.
            start_new_session=True,
        )


def _output(run: StudyRun) -> Path:
    return run.path / "logs" / "study.out"


def _left(seconds: float, done: int) -> str:
    return f", about {timedelta(seconds=round(seconds))} left" if done and round(seconds) else ""


def _stop(active: Sequence[_Training]) -> None:
    """Let the runs of this study save and end; kill them if that is interrupted, too."""
    processes = [training.process for training in active if training.process is not None]
    if not processes:
        return
    with contextlib.suppress(OSError):
        print("stopping: each run finishes its step and saves (press Ctrl-C again to stop at once)", flush=True)
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            signal_descendants(process.pid, signal.SIGKILL)
            process.kill()
        raise
    with contextlib.suppress(OSError):
        print("stopped; the same command continues", flush=True)
