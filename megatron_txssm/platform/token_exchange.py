"""What layers of experts exchange between processes, where gloo or the CPU differ from what Megatron expects."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def adapt_token_exchange() -> None:
    """Once per process."""
    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _counts_of_tokens
    for name, adapt in UNEQUAL_PARTS.items():
        setattr(mappings, name, adapt(getattr(mappings, name)))


def _counts_of_tokens(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Counts by which tokens are sent to experts, in the type that collectives take.

    Megatron converts them while it moves them from a GPU, and leaves them as they are on a CPU.
    """
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _with_unequal_parts(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Tensor-parallel processes have unequally many tokens of an expert; gloo gathers only parts of one size."""

    @functools.wraps(gather)
    def gather_padded(
        input_: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, *args, **kwargs)
        padded = input_.new_zeros(max(1, *output_split_sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = gather(padded, group).split(len(padded))
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return gather_padded


def _into_unequal_parts(reduce_scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(reduce_scatter)
    def reduce_and_take(
        input_: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, *args, **kwargs)
        total = input_.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    return reduce_and_take


# Functions of megatron.core.tensor_parallel.mappings.
UNEQUAL_PARTS = {
    "_gather_along_first_dim": _with_unequal_parts,
    "_reduce_scatter_along_first_dim": _into_unequal_parts,
}
