"""What one rank of a training needs: bytes of memory by kind, and bytes that it sends or receives in a step."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """All in bytes.

    Attributes:
        weights: parameters, in the precision in which they are multiplied
        gradients: Megatron's gradient buffers
        optimizer: fp32 master weights and moments, this rank's shard
        activations: peak of a step beyond these three
        traffic: (collective, group) -> bytes per step, of each call the largest tensor. Collectives: all_reduce,
            all_gather, reduce_scatter, all_to_all, send_recv, broadcast. Groups: tp, dp, pp, cp, ep, ...
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    traffic: Mapping[tuple[str, str], int]

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations
