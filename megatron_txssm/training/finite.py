"""Is any weight, or anything that the optimizer keeps, NaN or infinite?"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

# Name and tensor.
Named = tuple[str, torch.Tensor]


def first_not_finite(model: Iterable[Any], optimizer: Any = None) -> str:
    """The first weight, master weight or moment of Adam that is NaN or infinite, and its rank; empty where none is.

    On every rank the same. Each tensor is read once where it lies, and one number is fetched: no copies.
    """
    named = [*_weights(model), *_kept(optimizer)]
    broken = torch.zeros(1, dtype=torch.int, device=torch.cuda.current_device())
    broken += not _all_finite([tensor for _, tensor in named])
    dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    if not broken:
        return ""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, next((name for name, tensor in named if not tensor.isfinite().all()), None))
    return next(f"{name} on rank {rank}" for rank, name in enumerate(names) if name is not None)


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """A sum is finite only where all its terms are; only a sum that is not, of large terms, has to be looked into."""
    if not tensors:
        return True
    # An optimizer that is offloaded keeps some on the CPU.
    sums = [tensor.sum(dtype=torch.float32).to(tensors[0].device) for tensor in tensors]
    if bool(torch.stack(sums).isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _weights(model: Iterable[Any]) -> Iterator[Named]:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            yield f"the weight {name.removeprefix('module.').removeprefix('module.')}", parameter.detach()


def _kept(optimizer: Any) -> Iterator[Named]:
    """What a checkpoint holds of Megatron's optimizer: its fp32 weights, and of each what Adam keeps."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None or getattr(part, "is_stub_optimizer", False):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield "an fp32 weight of the optimizer", parameter.detach()
                for name, value in inner.state.get(parameter, {}).items():
                    # In 8 bits there may be a scale elsewhere; such have no infinity.
                    if torch.is_tensor(value) and value.is_floating_point() and value.element_size() > 1:
                        yield f"the optimizer's {name}", value.detach()
