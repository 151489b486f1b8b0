"""Finds the node whose loss ended an attempt.

A dying node resets its connections, so the ranks of other nodes may end before Slurm notices (SlurmdTimeout, 300 s by
default), and the attempt is recorded as `connection_lost`. Later, Slurm knows the node, and since when.
"""

import time
from collections.abc import Sequence

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.slurm.nodes import Node, node_states
from megatron_txssm.slurm.words import EndedBySlurm, why_slurm_ended_it

# Causes that the loss of a node may explain.
UNCLEAR = {Cause.CONNECTION_LOST, Cause.UNKNOWN}
# How long after an attempt's end Slurm, a health check or a person may take a node that ended it out of service, and
# how long before: a health check may see a failing device earlier than the ranks.
_AFTER_SECONDS, _BEFORE_SECONDS = 900, 300


def lost_nodes(nodes: list[str]) -> list[str]:
    """The `nodes` that do not respond to Slurm now; empty if Slurm itself does not answer."""
    lost = {node.name for node in _ask(nodes) if node.is_lost}
    return [node for node in nodes if node in lost]


def reconsider(found: Sequence[Attempt], *, ask: bool = True) -> list[Attempt]:
    """Correct the cause of attempts that the loss of a node ended, as Slurm knows by now; returns those changed.

    found: attempts in order, up to the last. ask: ask Slurm, at most once; otherwise only the jobs' outputs count.

    Nothing is saved. Does not fail: if Slurm does not answer, what it has written into the outputs still counts.
    """
    unclear = [index for index, attempt in enumerate(found) if attempt.cause in UNCLEAR]
    names = dict.fromkeys(node for index in unclear for node in found[index].nodes)
    known = _ask(list(names)) if ask and names else []
    return [found[index] for index in unclear if _reconsider(found[index], found[index + 1 :], known)]


def _ask(nodes: list[str]) -> list[Node]:
    try:
        return node_states(nodes)
    except UserError:
        return []


def _reconsider(attempt: Attempt, later: Sequence[Attempt], known: list[Node]) -> bool:
    suspects = [node for node in known if node.name in attempt.nodes and _may_have_ended(node, attempt, later)]
    # A lost node before one that somebody has drained.
    node = min(suspects, key=lambda node: not node.is_lost, default=None)
    ended = _ended_by_slurm(attempt, later)
    if node is None and ended is None:
        return False
    shown = "" if node is None else f"Slurm shows it as {node.state}{f' ({node.reason})' if node.reason else ''}"
    saw = f"rank {attempt.rank} reported: {attempt.detail}" if attempt.rank is not None else attempt.detail
    attempt.cause, attempt.detail = Cause.NODE_FAILURE, "; ".join(filter(None, (shown, saw)))
    attempt.rank, attempt.node = None, (ended and ended[1]) or (node and node.name)
    return True


def _ended_by_slurm(attempt: Attempt, later: Sequence[Attempt]) -> tuple[EndedBySlurm, str | None] | None:
    """What Slurm wrote about a lost node, and its name, before the next attempt; None if it wrote nothing."""
    end = later[0].output_offset if later and later[0].output == attempt.output else None
    ended = why_slurm_ended_it(attempt.read_output(end))
    return ended if ended is not None and ended[0] is EndedBySlurm.NODE_FAILURE else None


def _may_have_ended(node: Node, attempt: Attempt, later: Sequence[Attempt]) -> bool:
    """Whether Slurm's state of a node began about when an attempt ended, and before the node trained again."""
    if not node.is_unfit or attempt.ended is None:
        return False
    trained = (other.started for other in later if other.came_further and node.name in other.nodes)
    # Until Slurm has given a node up, it only shows that the node does not respond now.
    since = time.time() if node.since is None else node.since
    return attempt.ended - _BEFORE_SECONDS < since < min(attempt.ended + _AFTER_SECONDS, *trained, float("inf"))
