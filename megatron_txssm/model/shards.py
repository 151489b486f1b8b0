"""This rank's pieces of a model, with their names and places in a checkpoint, in any layout."""

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import nested_values
from torch import Tensor


def model_shards(model: Any, instead: Callable[[Tensor], Tensor | None] | None = None) -> Iterator[ShardedTensor]:
    """Each has `key`, `data`, `local_shape`, `global_shape` and `global_offset`; packed tensors are split by component.

    `global_slice()` is the shard's place in the whole tensor. Experts are numbered by a first axis that their `data`
    does not have (`prepend_axis_num`).

    instead: maps a saved tensor to its replacement, such as its gradient; None leaves the tensor out.
    """
    entries: Any = nested_values(model.sharded_state_dict())
    for entry in entries:
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or entry.data is None:
            continue
        if instead is not None:
            if (data := instead(entry.data)) is None:
                continue
            entry.data = data
        shards: Any = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        yield from shards
