"""Counts, below autograd, the bytes of all live tensors and of all collectives."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# As the CUDA allocator rounds.
BLOCK = 512
# Bytes of a norm, a loss or a flag, whose collectives are not counted.
A_NUMBER = 8
# torch's operators by the name under which their bytes are counted; barriers and the like have no tensor.
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send_recv",
    "recv_": "send_recv",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
}


class GroupNames:
    """Short names of this rank's process groups; a group that has none takes that of another with the same ranks."""

    def __init__(self, groups: dict[str, ProcessGroup]):
        self._exact = {group.group_name: name for name, group in reversed(groups.items())}
        self._by_ranks = {_ranks_of(group): name for name, group in reversed(groups.items())}

    def of(self, group: ProcessGroup) -> str:
        return self._exact.get(group.group_name) or self._by_ranks.get(_ranks_of(group), "world")


def _ranks_of(group: ProcessGroup) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))


class Watch(TorchDispatchMode):
    """Live bytes and their peak, of all storages made while it is active, and traffic by (collective, group).

    A storage counts in whole blocks, once, until it is freed.
    """

    def __init__(self, names: "GroupNames"):
        super().__init__()
        self.live = self.peak = 0
        self.traffic: Counter[tuple[str, str]] = Counter()
        self._names = names
        self._storages: dict[int, int] = {}

    def forget_traffic(self) -> None:
        self.traffic = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._hold(tensor)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or not storage.nbytes():
            return
        self._storages[key] = size = in_blocks(storage.nbytes())
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._storages.pop(key)

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        name = COLLECTIVES.get(func._schema.name.partition("::")[2])
        group = _group_of(args)
        # A coalesced call has lists of tensors, and so has a gather into one.
        sizes = [sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(arg)) for arg in args]
        largest = max(sizes, default=0)
        if name is None or group is None or group.size() == 1 or largest <= A_NUMBER:
            return
        where = self._names.of(group)
        # Megatron sends to the next stage in one of several groups.
        self.traffic[name, "pp" if name == "send_recv" and where != "cp" else where] += largest


def in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def _group_of(args: tuple[Any, ...]) -> ProcessGroup | None:
    unbox: Callable[[Any], ProcessGroup] = ProcessGroup.unbox  # pyright: ignore[reportAttributeAccessIssue]
    for leaf in tree_leaves(list(args)):
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return unbox(leaf)
    return None
