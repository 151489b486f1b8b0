"""As test_faults.py, of nodes; a file of its own, so that another process can run it."""

from collections.abc import Callable

import pytest

from tests.cluster.faults import Fault
from tests.cluster.training_job import SAVE_INTERVAL, TrainingJob


def power_off(node: str) -> Fault:
    return lambda job: job.sandbox.must("poweroff", node)


def unplug(job: TrainingJob) -> None:
    job.sandbox.must("unplug", "n2")


def lose_node_while_saving(job: TrainingJob) -> None:
    """In the moment in which the next checkpoint is begun and not yet complete."""
    lost = job.process(1)
    while True:
        saved = job.saved()
        folder = job.run / "checkpoints" / f"iter_{saved + SAVE_INTERVAL:07d}"
        job.wait_until(folder.exists, "the next save")
        # Its share of this save is missing from here on, unless the save is over already.
        lost.suspend()
        if job.saved() == saved:
            break
        lost.resume()
    job.sandbox.must("poweroff", "n2")


# name: (what is done, the node that it takes away)
FAULTS: dict[str, tuple[Fault, str]] = {
    "power-off of the second node": (power_off("n2"), "n2"),
    "power-off of the first node": (power_off("n1"), "n1"),
    "unplugged network": (unplug, "n2"),
    "node loss during a save": (lose_node_while_saving, "n2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_of_a_node_costs_time_and_nothing_else(name: str, disturb: Callable[..., None]) -> None:
    """And the node is named, if not in the record of the moment, then once Slurm knows it."""
    fault, lost = FAULTS[name]
    disturb(name, fault, "node_failure", lost=lost)
