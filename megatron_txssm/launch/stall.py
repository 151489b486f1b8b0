"""Ends a training step that hangs: no line in metrics.jsonl for too long, whatever the reason.

A rank that is stopped, or waits for a file system, makes all others wait in a collective; Megatron's own
--distributed-timeout-minutes ends those. Where every rank waits for something else, only this does.
"""

import re
import subprocess
import time
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError
from megatron_txssm.launch.slurm import run_slurm

# Before the first step: imports, the index of a large corpus, the first compilation.
STARTUP_SECONDS = 1800
# For the ranks to write their stacks.
STACKS_SECONDS = 3


class StallWatch:
    """Watches metrics.jsonl, which grows with every step and every validation."""

    def __init__(self, run: Path, timeout_seconds: float):
        self.run = run
        self.timeout_seconds = timeout_seconds
        self.size = 0
        self.size = self._size()
        self.started = False
        # This machine's clock: that of the file server may differ.
        self.grew = time.monotonic()

    def is_stalled(self) -> bool:
        size = self._size()
        if size != self.size:
            self.size, self.grew, self.started = size, time.monotonic(), True
        limit = self.timeout_seconds if self.started else max(self.timeout_seconds, STARTUP_SECONDS)
        return time.monotonic() - self.grew > limit

    def end_step(self, job_id: str, srun: subprocess.Popen, num_ranks: int) -> dict[str, Any]:
        """Let every rank write its stacks into its log, then kill the step; returns `Attempt.hang`."""
        seconds = time.monotonic() - self.grew
        logs = [self.run / "logs" / f"rank_{rank}.log" for rank in range(num_ranks)]
        before = [log.stat().st_size if log.exists() else 0 for log in logs]
        try:
            step = _step_id(job_id)
            run_slurm("scancel", "--signal=USR2", step)
            time.sleep(STACKS_SECONDS)
            silent = [rank for rank, log in enumerate(logs) if not _wrote_stacks(log, before[rank])]
            run_slurm("scancel", "--signal=KILL", step)
        except UserError:
            # slurmctld is away; without its srun the step ends, too.
            silent = []
            srun.kill()
        return {"seconds": round(seconds, 1), "silent_ranks": silent}

    def _size(self) -> int:
        try:
            return (self.run / "metrics.jsonl").stat().st_size
        except OSError:
            # Not there yet; or the file server is away, which is no step.
            return self.size


def _step_id(job_id: str) -> str:
    """The trainer's step: there may be others."""
    steps = run_slurm("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i %j")
    found = re.search(rf"^({job_id}\.\d+) train$", steps, re.MULTILINE)
    if found is None:
        raise UserError(f"job {job_id} has no step named train")
    return found[1]


def _wrote_stacks(log: Path, offset: int) -> bool:
    if not log.exists():
        return False
    with log.open("rb") as file:
        file.seek(offset)
        # How Python's faulthandler begins.
        return b"most recent call first" in file.read()
