"""Ends a step that goes on after one of its tasks has failed.

srun ends it, by way of slurmctld: not one that was away then, or that was restarted and knows nothing of the step. The
other ranks would wait in a collective until the step timeout.
"""

import contextlib
import subprocess
import time

from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.supervisor.stall import kill_step
from megatron_txssm.slurm.words import failed_tasks

# Well above Slurm's KillWait (30 s), within which srun's own signals have ended the step.
GRACE_SECONDS = 120
# Between two looks at the output.
LOOK_SECONDS = 5


class FailedTaskWatch:
    """Watches what srun says of an attempt's tasks."""

    def __init__(self, attempt: Attempt):
        self.output = attempt.output
        self.offset = attempt.output_offset
        self.failed: float | None = None
        self.looked = 0.0

    def ends(self, job_id: str, srun: subprocess.Popen) -> bool:
        """Kill a step whose first failure is long ago; whether that was so. Some of its ranks may live on."""
        now = time.monotonic()
        if self.failed is None and now - self.looked > LOOK_SECONDS:
            self.looked = now
            if any(failed_tasks(self._new_lines())):
                self.failed = now
        if self.failed is None or now - self.failed < GRACE_SECONDS:
            return False
        kill_step(job_id, srun)
        return True

    def _new_lines(self) -> str:
        """Whole ones, since the last look."""
        with contextlib.suppress(OSError), open(self.output or "/dev/null", "rb") as file:
            file.seek(self.offset)
            lines, newline, _ = file.read().rpartition(b"\n")
            self.offset += len(lines + newline)
            return lines.decode(errors="replace")
        return ""
