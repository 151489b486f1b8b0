"""Packed parameters in a checkpoint: saved by component, so that every layout can load them."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_txssm.compat import split_tensor_factory


def saved_by_component(packed: ShardedTensor, sizes: dict[str, int]) -> ShardedTensorFactory:
    """The sharded state dict's entry for a tensor whose rows are components of these sizes on this rank.

    Further rows are padding: they are not saved, and are zero after a load. The same holds for optimizer states.
    """
    rows = sum(sizes.values())
    padding = packed.local_shape[0] - rows
    if not padding:
        return split_tensor_factory(packed, list(sizes.values()), list(sizes), 0)
    assert packed.data is not None, f"{packed.key} has no data"
    (own,) = packed.narrow(0, 0, rows)
    factory = split_tensor_factory(own, list(sizes.values()), list(sizes), 0)

    def build(key: str, tensor: Tensor, *options: Any) -> Any:
        return factory.build_fn(key, tensor[:rows], *options)

    def merge(components: Any) -> Tensor:
        merged = factory.merge_fn(components)
        return torch.cat([merged, merged.new_zeros(padding, *merged.shape[1:])])

    # The parameter itself: Megatron uses it to find the optimizer's state.
    return ShardedTensorFactory(packed.key, packed.data, build, merge, packed.replica_id)
