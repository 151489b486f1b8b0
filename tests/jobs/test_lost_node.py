"""A node that Slurm misses only after the ranks have lost their connections to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.diagnosis import lost_node
from megatron_txssm.jobs.diagnosis.lost_node import lost_nodes, reconsider
from megatron_txssm.slurm.nodes import Node
from tests.jobs.some_attempt import some_attempt

END = 5000.0
IDLE = Node("n1", "idle", "", None)


@pytest.fixture
def shows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Takes what sinfo shows, or its error; returns a list that gets each question."""

    def set_up(*nodes: Node, error: str = "") -> list[list[str]]:
        asked: list[list[str]] = []

        def node_states(names: list[str]) -> list[Node]:
            asked.append(names)
            if error:
                raise UserError(error)
            return list(nodes)

        monkeypatch.setattr(lost_node, "node_states", node_states)
        return asked

    return set_up


def unclear(run: Path, number: int = 1, **fields: Any) -> Attempt:
    """It ended at END since rank 0, on n1, lost its connections."""
    known: dict[str, Any] = {"cause": "connection_lost", "detail": "reset", "rank": 0, "node": "n1", "ended": END}
    return some_attempt(run, number, **known | fields)


@pytest.mark.parametrize(
    ("node", "detail"),
    [
        (Node("n2", "down*", "Not responding", END + 300), "Slurm shows it as down* (Not responding)"),
        (Node("n2", "down", "", END + 1), "Slurm shows it as down"),
        (Node("n2", "drng", "NHC: no GPU", END - 100), "Slurm shows it as drng (NHC: no GPU)"),
        (Node("n2", "fail", "disk", END + 100), "Slurm shows it as fail (disk)"),
        # Not given up yet.
        (Node("n2", "comp*", "", None), "Slurm shows it as comp*"),
    ],
)
def test_the_node_that_slurm_misses_since_then(
    tmp_path: Path, shows: Callable, monkeypatch: pytest.MonkeyPatch, node: Node, detail: str
) -> None:
    shows(IDLE, node)
    monkeypatch.setattr(lost_node.time, "time", lambda: END + 5)
    attempt = unclear(tmp_path)
    assert reconsider([attempt]) == [attempt]
    assert (attempt.cause, attempt.node, attempt.rank) == ("node_failure", "n2", None)
    assert attempt.detail == f"{detail}; rank 0 reported: reset"
    assert reconsider([attempt]) == []


@pytest.mark.parametrize(
    "node",
    [
        IDLE,
        Node("n2", "alloc", "", None),
        # Drained before, and training nevertheless; down a day later; another job's node.
        Node("n2", "drng", "maintenance", END - 1000),
        Node("n2", "down*", "Not responding", END + 86_400),
        Node("n9", "down*", "Not responding", END + 10),
        # Silent now, a day later.
        Node("n2", "idle*", "", None),
    ],
)
def test_a_node_that_cannot_have_ended_it(
    tmp_path: Path, shows: Callable, monkeypatch: pytest.MonkeyPatch, node: Node
) -> None:
    shows(node)
    monkeypatch.setattr(lost_node.time, "time", lambda: END + 86_400)
    attempt = unclear(tmp_path)
    assert reconsider([attempt]) == []
    assert (attempt.cause, attempt.node, attempt.detail) == ("connection_lost", "n1", "reset")


def test_a_node_that_trained_again_was_lost_later(tmp_path: Path, shows: Callable) -> None:
    shows(Node("n2", "down*", "Not responding", END + 300))
    first = unclear(tmp_path)
    idle = some_attempt(tmp_path, 2, started=END + 10, last_step=10, cause="preflight")
    elsewhere = some_attempt(tmp_path, 3, started=END + 20, nodes=["n3"], last_step=20, cause="killed")
    assert reconsider([first, idle, elsewhere]) == [first]
    first = unclear(tmp_path)
    again = unclear(tmp_path, 2, started=END + 10, last_step=20, ended=END + 290)
    assert reconsider([first, again]) == [again]
    assert first.cause == "connection_lost"


def test_a_lost_node_goes_before_a_drained_one(tmp_path: Path, shows: Callable) -> None:
    shows(Node("n1", "drain", "look", END + 100), Node("n2", "down*", "Not responding", END + 300))
    (attempt,) = reconsider([unclear(tmp_path)])
    assert attempt.node == "n2"


def test_slurm_is_asked_once_and_only_if_a_cause_is_unclear(tmp_path: Path, shows: Callable) -> None:
    asked = shows()
    assert reconsider([some_attempt(tmp_path, cause="killed", node="n2", ended=END)]) == [] and asked == []
    found = [unclear(tmp_path), unclear(tmp_path, 2, cause="unknown", nodes=["n2", "n3"])]
    assert reconsider(found) == [] and asked == [["n1", "n2", "n3"]]
    assert reconsider(found, ask=False) == [] and len(asked) == 1


def test_what_slurm_wrote_after_the_record_counts_without_an_answer(tmp_path: Path, shows: Callable) -> None:
    shows(error="Slurm does not answer")
    output = tmp_path / "pretrain-21.out"
    lost = (
        "srun: error: n1: task 0: Exited with exit code 1\nsrun: error: Node failure on n2\n"
        "slurmstepd-n1: error: *** JOB 21 ON n1 CANCELLED AT 2026-11-24T14:45:18 DUE TO NODE FAILURE, SEE SLURMCTLD "
        "LOG FOR DETAILS ***\n"
    )
    output.write_text(lost + lost.replace("n2", "n3"))
    first = unclear(tmp_path, output=str(output))
    second = unclear(tmp_path, 2, output=str(output), output_offset=len(lost), nodes=["n1", "n3"])
    assert reconsider([first, second]) == [first, second]
    assert [(each.cause, each.node) for each in (first, second)] == [("node_failure", "n2"), ("node_failure", "n3")]
    assert lost_nodes(["n1", "n2"]) == []


def test_nodes_that_do_not_respond_now(shows: Callable) -> None:
    # One entry for each partition.
    shows(*2 * [IDLE, Node("n2", "comp*", "", None), Node("n3", "drain", "look", 1.0), Node("n4", "down", "", 1.0)])
    assert lost_nodes(["n4", "n3", "n2", "n1"]) == ["n4", "n2"]
