"""The resources that a job requests: nodes, processes, GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """Processes per node; each has its own GPU, if there are any."""

    nodes: int
    nproc_per_node: int
    gpus_per_node: int
    # Additional nodes, which replace bad ones.
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
        # The job survives the loss of a node, which a spare one replaces.
        return options | {"no-kill": None} if self.spare else options

    def __str__(self) -> str:
        kind = "GPU" if self.gpus_per_node else "process"
        plural = "" if self.nproc_per_node == 1 else "s" if self.gpus_per_node else "es"
        spare = f" and {self.spare} spare" if self.spare else ""
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''} x {self.nproc_per_node} {kind}{plural}{spare}"
