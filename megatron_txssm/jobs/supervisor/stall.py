"""Ends a trainer that hangs: metrics.jsonl has not grown for too long, whatever the reason.

If one rank is stopped or waits for a file system, all others wait in a collective, and Megatron's
--distributed-timeout-minutes ends them. If every rank waits for something else, only this watch ends them.
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

# Time for the ranks to write their stacks.
STACKS_SECONDS = 3
# Time for a killed step to disappear from every node.
LEFTOVER_SECONDS = 60
# After a longer gap between two checks, this process was suspended together with the trainer.
SUSPENDED_SECONDS = 30


class StallWatch:
    """Watches metrics.jsonl, which grows with every step and every validation, and the checkpoint folder.

    `limits`, {"start": …, "step": …, "save": …}: maximum seconds until the first step (imports, the index of a large
    corpus, the first compilation), then without a step or validation, and without one while a checkpoint is written.
    """

    def __init__(self, run: Path, checkpoints: Path, limits: Mapping[Phase, float]):
        self.run = run
        self.checkpoints = checkpoints
        self.limits = limits
        self.size = 0
        self.size = self._size()
        self.started = False
        # Unfinished checkpoints of earlier attempts.
        self.leftovers = self._unfinished()
        # This machine's clock: the file server's may differ.
        self.grew = self.looked = time.monotonic()

    def stalled_phase(self) -> Phase | None:
        """The phase whose limit is exceeded; None while the trainer makes progress."""
        now = time.monotonic()
        if now - self.looked > SUSPENDED_SECONDS:
            # By scontrol suspend, or because the machine was asleep.
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
        # None until the ranks have been asked for their stacks.
        silent: list[int] | None = None
        # If slurmctld is down, the ranks cannot be asked.
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
            # The file does not exist yet, or the file server is down; neither is a step.
            return self.size

    def _unfinished(self) -> set[tuple[str, int]]:
        """(name, mtime in ns) of checkpoint folders beyond the newest complete one: being written, or abandoned."""
        try:
            newest = saved_step(self.checkpoints) or 0
            found = {path.name.removeprefix("iter_"): path.stat().st_mtime_ns for path in self.checkpoints.iterdir()}
        except (OSError, UserError):
            return set()
        return {(name, changed) for name, changed in found.items() if name.isdecimal() and int(name) > newest}


def kill_step(job_id: str, srun: subprocess.Popen) -> None:
    """Kill the trainer's step and wait until its srun has ended; if slurmctld is down, ranks may survive."""
    with contextlib.suppress(UserError):
        run_slurm("scancel", "--signal=KILL", _step_id(job_id))
        deadline = time.monotonic() + LEFTOVER_SECONDS
        while srun.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
    # slurmctld may be down, or was restarted and does not know the step.
    srun.kill()


def end_leftover_steps(job_id: str) -> bool:
    """Kill steps left by earlier attempts of this job, which would keep training; returns whether they are gone.

    A slurmctld that was down still lists steps that ended meanwhile: it can neither end such a step nor reuse its
    resources until the job is restarted.
    """
    # If Slurm refuses to list the steps, the next step's srun reports why.
    with contextlib.suppress(UserError):
        for _ in range(2 * LEFTOVER_SECONDS):
            steps = until_answered(_steps, job_id)
            if not steps:
                return True
            for step in steps:
                # The step may have ended by itself.
                with contextlib.suppress(UserError):
                    run_slurm("scancel", "--signal=KILL", step)
            time.sleep(0.5)
        return False
    return True


def _steps(job_id: str) -> dict[str, str]:
    """Step id -> name, of the steps that the supervisor starts."""
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
        # Printed by Python's faulthandler before a stack.
        return b"most recent call first" in file.read()
