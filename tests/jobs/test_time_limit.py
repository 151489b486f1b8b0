"""Time limits that are changed while the job runs."""

import time

import pytest

from megatron_txssm.jobs.supervisor.time_limit import TimeLimit
from megatron_txssm.slurm import client as slurm

HOUR = 3600


@pytest.mark.parametrize(
    ("at_start", "now", "near", "reached"),
    [
        (HOUR, HOUR, False, False),
        (100, 100, True, False),
        (-5, -5, True, True),
        # Shortened: Slurm's signal is all that the job hears of it.
        (HOUR, 100, True, False),
        # Extended, and outlived.
        (100, HOUR, False, False),
        (-HOUR, HOUR, False, False),
        (-HOUR, -HOUR, True, True),
    ],
)
def test_it_may_have_changed(
    monkeypatch: pytest.MonkeyPatch, at_start: int, now: int, near: bool, reached: bool
) -> None:
    began = time.time()

    def time_limit_of(job_id: str, **asked: bool) -> float:
        return began + (at_start if asked else now)

    monkeypatch.setattr(slurm, "time_limit_of", time_limit_of)
    assert TimeLimit("17", stop_before=60).is_reached() is reached
    assert TimeLimit("17", stop_before=60).is_near() is near


def test_slurmctld_is_not_asked_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be away, and a job that is told to stop has seconds left."""

    def time_limit_of(job_id: str, *, at_start: bool = False) -> float:
        assert at_start
        return time.time() - 60

    monkeypatch.setattr(slurm, "time_limit_of", time_limit_of)
    assert TimeLimit("17", stop_before=60).is_reached()
