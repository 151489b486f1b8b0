"""States of nodes, as sinfo shows them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_txssm.slurm.client import run_slurm

# sinfo's letters for the fields of `Node`, and the separators before a node and between fields: no name contains them.
_FIELDS = ("%N", "%t", "%H", "%E")
_NODE, _FIELD = "\x1e", "\x1f"


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    name: str
    # Slurm's short form: idle, mix, alloc, comp, down*, drng …; a star marks a node that does not respond.
    state: str
    # Why it is down or drained, and since when, in seconds since the epoch; empty and None for other nodes.
    reason: str
    since: float | None

    @property
    def is_lost(self) -> bool:
        """Whether it does not respond, or Slurm has given it up."""
        return self.state.endswith("*") or self.state.startswith("down")

    @property
    def is_unfit(self) -> bool:
        """Whether it is lost, or somebody has taken it out of service."""
        return self.is_lost or self.state.startswith(("fail", "drain", "drng"))


def node_states(names: Sequence[str]) -> list[Node]:
    """The states of nodes, one entry per partition of each; UserError if Slurm does not answer."""
    form = _NODE + _FIELD.join(_FIELDS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SINFO_")}
    text = run_slurm(
        *("sinfo", "--all", "--noheader", "--Node", f"--nodes={','.join(names)}", f"--format={form}"),
        env=environment | {"SLURM_TIME_FORMAT": "%s"},
    )
    rows = [entry.removesuffix("\n").split(_FIELD, len(_FIELDS) - 1) for entry in text.split(_NODE)[1:]]
    return [_node(*row) for row in rows if len(row) == len(_FIELDS)]


def _node(name: str, state: str, since: str, reason: str) -> Node:
    known = since.isdecimal() and reason != "none"
    return Node(name, state, " ".join(reason.split()) if known else "", float(since) if known else None)
