"""Ends a step that keeps running after one of its tasks has failed.

Normally srun ends it through slurmctld. That fails if slurmctld is down, or was restarted and does not know the step;
the other ranks would then wait in a collective until the step timeout.
"""

import contextlib
import subprocess
import time

from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.supervisor.stall import kill_step
from megatron_txssm.slurm.words import failed_tasks

# Well above Slurm's KillWait (30 s), by which time srun's own signals have ended the step.
GRACE_SECONDS = 120
# Between two reads of the output.
LOOK_SECONDS = 5


class FailedTaskWatch:
    """Watches srun's messages about an attempt's tasks."""

    def __init__(self, attempt: Attempt):
        self.output = attempt.output
        self.offset = attempt.output_offset
        self.failed: float | None = None
        self.looked = 0.0

    def ends(self, job_id: str, srun: subprocess.Popen) -> bool:
        """Kill the step if its first failure is `GRACE_SECONDS` old; returns whether it did. Some ranks may survive."""
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
        """Complete lines since the last read."""
        with contextlib.suppress(OSError), open(self.output or "/dev/null", "rb") as file:
            file.seek(self.offset)
            lines, newline, _ = file.read().rpartition(b"\n")
            self.offset += len(lines + newline)
            return lines.decode(errors="replace")
        return ""
