"""Ends a training step that hangs: nothing new in metrics.jsonl for too long, whatever the reason.

A rank that is stopped, or waits for a file system, makes all others wait in a collective; Megatron's own
--distributed-timeout-minutes ends those. Where every rank waits for something else, only this does.
"""

import contextlib
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Hang
from megatron_txssm.jobs.limits import Phase
from megatron_txssm.jobs.supervisor.requeue import until_answered
from megatron_txssm.slurm.client import run_slurm
from megatron_txssm.training.launch.preflight import saved_step

# For the ranks to write their stacks.
STACKS_SECONDS = 3
# For a step that was killed to be gone from every node.
LEFTOVER_SECONDS = 60
# Between two looks of a process that runs: after more, it was suspended together with the trainer.
SUSPENDED_SECONDS = 30


class StallWatch:
    """Watches metrics.jsonl, which grows with every step and every validation, and the checkpoints' folder.

    `limits`: seconds until the first step (imports, the index of a large corpus, the first compilation), from then on
    without a step or validation, and without one while a checkpoint is written: {"start": …, "step": …, "save": …}.
    """

    def __init__(self, run: Path, checkpoints: Path, limits: Mapping[Phase, float]):
        self.run = run
        self.checkpoints = checkpoints
        self.limits = limits
        self.size = 0
        self.size = self._size()
        self.started = False
        # What an earlier attempt left half-written.
        self.leftovers = self._unfinished()
        # This machine's clock: that of the file server may differ.
        self.grew = self.looked = time.monotonic()

    def stalled_phase(self) -> Phase | None:
        """Of `limits`, the one that is exceeded; None while the trainer comes on."""
        now = time.monotonic()
        if now - self.looked > SUSPENDED_SECONDS:
            # scontrol suspend, or a machine that slept.
            self.grew += now - self.looked
        self.looked = now
        size = self._size()
        if size != self.size:
            self.size, self.grew, self.started = size, now, True
        silent = now - self.grew
        if silent <= min(self.limits.values()):
            return None
        phase: Phase = "start" if not self.started else "save" if self._unfinished() - self.leftovers else "step"
        return phase if silent > self.limits[phase] else None

    def end_step(self, job_id: str, srun: subprocess.Popen, num_ranks: int, phase: Phase) -> Hang:
        """Let every rank write its stacks into its log, then kill the step; returns `Attempt.hang`."""
        seconds = time.monotonic() - self.grew
        logs = [self.run / "logs" / f"rank_{rank}.log" for rank in range(num_ranks)]
        before = [log.stat().st_size if log.exists() else 0 for log in logs]
        # Nobody has been asked for stacks yet.
        silent: list[int] | None = None
        # A slurmctld that is away asks nobody, either.
        with contextlib.suppress(UserError, OSError):
            run_slurm("scancel", "--signal=USR2", _step_id(job_id))
            time.sleep(STACKS_SECONDS)
            silent = [rank for rank, log in enumerate(logs) if not _wrote_stacks(log, before[rank])]
        kill_step(job_id, srun)
        return {"seconds": round(seconds, 1), "silent_ranks": silent, "during": phase}

    def _size(self) -> int:
        try:
            return (self.run / "metrics.jsonl").stat().st_size
        except OSError:
            # Not there yet; or the file server is away, which is no step.
            return self.size

    def _unfinished(self) -> set[tuple[str, int]]:
        """(name, time of the last change) of the checkpoints behind the newest: one is being written, or never was."""
        try:
            newest = saved_step(self.checkpoints) or 0
            found = {path.name.removeprefix("iter_"): path.stat().st_mtime_ns for path in self.checkpoints.iterdir()}
        except (OSError, UserError):
            return set()
        return {(name, changed) for name, changed in found.items() if name.isdecimal() and int(name) > newest}


def kill_step(job_id: str, srun: subprocess.Popen) -> None:
    """Kill the trainer's step and wait until its srun has ended; its ranks may live on where slurmctld is away."""
    with contextlib.suppress(UserError):
        run_slurm("scancel", "--signal=KILL", _step_id(job_id))
        deadline = time.monotonic() + LEFTOVER_SECONDS
        while srun.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
    # slurmctld is away, or was restarted and does not know the step.
    srun.kill()


def end_leftover_steps(job_id: str) -> bool:
    """Kill the steps that an earlier attempt of this job left, which would train on; whether they are gone.

    A slurmctld that was away believes in steps that ended meanwhile: it can neither end one nor give its place to
    another before the job is started again.
    """
    # Where Slurm refuses to list them, the next step's srun says why.
    with contextlib.suppress(UserError):
        for _ in range(2 * LEFTOVER_SECONDS):
            steps = until_answered(_steps, job_id)
            if not steps:
                return True
            for step in steps:
                # It may end by itself meanwhile.
                with contextlib.suppress(UserError):
                    run_slurm("scancel", "--signal=KILL", step)
            time.sleep(0.5)
        return False
    return True


def _steps(job_id: str) -> dict[str, str]:
    """Number -> name of the steps that the supervisor starts."""
    steps = run_slurm("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i %j")
    return dict(re.findall(rf"^({job_id}\.\d+) (train|preflight|bandwidth)$", steps, re.MULTILINE))


def _step_id(job_id: str) -> str:
    for step, name in _steps(job_id).items():
        if name == "train":
            return step
    raise UserError(f"job {job_id} has no step named train")


def _wrote_stacks(log: Path, offset: int) -> bool:
    if not log.exists():
        return False
    with log.open("rb") as file:
        file.seek(offset)
        # How Python's faulthandler begins.
        return b"most recent call first" in file.read()
