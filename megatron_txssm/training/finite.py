"""Searches a model's weights and its optimizer's state for NaN and infinity."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

# Name and tensor.
Named = tuple[str, torch.Tensor]


def first_not_finite(model: Iterable[torch.nn.Module], optimizer: "MegatronOptimizer | None" = None) -> str:
    """The first weight, master weight or Adam moment that is NaN or infinite, and its rank; empty if all are finite.

    Every rank returns the same. Tensors are read in place, without copies; only one number is copied to the host.
    """
    named = [*_weights(model), *_kept(optimizer)]
    broken = torch.zeros(1, dtype=torch.int, device=torch.cuda.current_device())
    broken += not _all_finite([tensor for _, tensor in named])
    dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    if not broken:
        return ""
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, next((name for name, tensor in named if not tensor.isfinite().all()), None))
    return next(f"{name} on rank {rank}" for rank, name in enumerate(names) if name is not None)


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """A finite sum proves that all terms are finite; otherwise each tensor is checked, as large terms may overflow."""
    if not tensors:
        return True
    # An offloaded optimizer keeps some tensors on the CPU.
    sums = [tensor.sum(dtype=torch.float32).to(tensors[0].device) for tensor in tensors]
    if bool(torch.stack(sums).isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _weights(model: Iterable[torch.nn.Module]) -> Iterator[Named]:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            yield f"the weight {name.removeprefix('module.').removeprefix('module.')}", parameter.detach()


def _kept(optimizer: "MegatronOptimizer | None") -> Iterator[Named]:
    """The optimizer state in a checkpoint: fp32 master weights, and Adam's state for each."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None or getattr(part, "is_stub_optimizer", False):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                yield "an fp32 weight of the optimizer", parameter.detach()
                for name, value in inner.state.get(parameter, {}).items():
                    # 8-bit types are skipped: they may have a separate scale, and have no infinity.
                    if torch.is_tensor(value) and value.is_floating_point() and value.element_size() > 1:
                        yield f"the optimizer's {name}", value.detach()
