"""The time limit of the supervisor's job, which somebody may change while it runs (`scontrol update`)."""

import time

from megatron_txssm.slurm import client as slurm

# Slurm sends the signal of --signal up to a minute early.
SIGNAL_SLACK_SECONDS = 75
# A job that lives this long after its time limit has another one: Slurm looks for those to end every 30 s.
OUTLIVED_SECONDS = 120


class TimeLimit:
    """When Slurm ends the job; its trainer is told to stop `stop_before` seconds earlier."""

    def __init__(self, job_id: str, stop_before: int):
        self.job_id, self.stop_before = job_id, stop_before
        self._end = slurm.time_limit_of(job_id, at_start=True)

    def is_near(self) -> bool:
        """Whether the trainer was told to stop because of it, if it was."""
        self._end = slurm.time_limit_of(self.job_id)
        return self._ends_within(self.stop_before + SIGNAL_SLACK_SECONDS)

    def is_reached(self) -> bool:
        """Once it is, a saving trainer and the supervisor have only KillWait left."""
        if self._ends_within(-OUTLIVED_SECONDS):
            self._end = slurm.time_limit_of(self.job_id)
        return self._ends_within(2)

    def _ends_within(self, seconds: float) -> bool:
        return time.time() > self._end - seconds
