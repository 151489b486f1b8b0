"""A recipe's requirements: processes per copy of its model, bytes per checkpoint."""

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.recipe.recipe import Recipe


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of one checkpoint: weights in the model's precision, Adam's two moments and the optimizer's weights in fp32.

    Random states, tokens and the index are not counted; they take megabytes.
    """
    weight = 2 if recipe.training.precision == "bf16" else 4
    return (weight + 12) * count_parameters(recipe.sizes).total


def smallest_world_size(recipe: Recipe) -> int:
    """Processes per copy of the model."""
    parallel = recipe.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
