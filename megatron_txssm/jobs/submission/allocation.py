"""What a job asks for of the cluster: nodes, processes, GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """Processes over nodes; each has a GPU of its own, where there are any."""

    nodes: int
    nproc_per_node: int
    gpus_per_node: int
    # Nodes beside those, that a bad one's place is taken by.
    spare: int = 0

    @property
    def world_size(self) -> int:
        return self.nodes * self.nproc_per_node

    @property
    def options(self) -> dict[str, str | None]:
        options: dict[str, str | None] = {
            "nodes": str(self.nodes + self.spare),
            "ntasks-per-node": str(self.nproc_per_node),
            "gpus-per-node": str(self.gpus_per_node or ""),
        }
        # The job outlives a lost node, whose place a spare one takes.
        return options | {"no-kill": None} if self.spare else options

    def __str__(self) -> str:
        kind = "GPU" if self.gpus_per_node else "process"
        plural = "" if self.nproc_per_node == 1 else "s" if self.gpus_per_node else "es"
        spare = f" and {self.spare} spare" if self.spare else ""
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} x {self.nproc_per_node} {kind}{plural}{spare}"
