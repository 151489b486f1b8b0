"""A recipe's requirements, number of processes and bytes per checkpoint; models of equal size."""

import math
from collections.abc import Iterator

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.recipe import Recipe


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of one checkpoint: weights in the model's precision, Adam's two moments and the optimizer's weights in fp32.

    Muon has one moment of each matrix; the state-space layers' few vectors are taken for matrices, too.

    Random states, tokens and the index are not counted; they take megabytes.
    """
    weight = 2 if recipe.training.precision == "bf16" else 4
    count = count_parameters(recipe.sizes)
    matrices = count.total - count.embedding - count.output - count.norms if recipe.optimizer.name == "muon" else 0
    return (weight + 12) * count.total - 4 * matrices


def smallest_world_size(recipe: Recipe) -> int:
    """The fewest processes that the layout needs: one copy of the model, or as many as share the experts."""
    parallel = recipe.parallel
    sharing = math.lcm(parallel.context_parallel_size, parallel.expert_model_parallel_size)
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * sharing


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """Copies of the model's layout over all processes; UserError if the processes do not divide evenly."""
    parallel = recipe.parallel
    factors = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
    }
    model_size = 1
    for size in factors.values():
        model_size *= size
    if world_size % model_size != 0:
        named = " x ".join(f"{name}={size}" for name, size in factors.items() if size > 1)
        raise UserError(
            f"{world_size} process{'es' if world_size != 1 else ''} cannot be divided into {named}; "
            f"start a multiple of {model_size} processes"
        )
    return world_size // model_size


def divisors(*numbers: int) -> Iterator[int]:
    """The common divisors of `numbers`, ascending."""
    common = math.gcd(*numbers)
    lower = [d for d in range(1, math.isqrt(common) + 1) if common % d == 0]
    yield from lower
    yield from (common // d for d in reversed(lower) if d * d != common)


def check_divisible(name: str, value: int, by_name: str, by: int, remedy: str | None = None) -> None:
    """UserError with the legal values, or `remedy`, unless `value` is divisible by `by`."""
    if value % by != 0:
        legal = remedy or f"use one of {', '.join(map(str, divisors(value)))}"
        raise UserError(f"{name}={value} is not divisible by {by_name}={by}; {legal}")


def of_equal_size(recipe: Recipe, other: Recipe, multiple: int = 8) -> Recipe:
    """The recipe with the FFN, of a `multiple` of channels, that brings it nearest to the other's parameters."""

    def parameters(channels: int) -> int:
        return count_parameters(changed(recipe, {"model.ffn_hidden_size": channels}).sizes).total

    wanted = count_parameters(other.sizes).total
    fewest = parameters(multiple)
    more = round((wanted - fewest) / (parameters(2 * multiple) - fewest))
    return changed(recipe, {"model.ffn_hidden_size": multiple * max(1, 1 + more)})
