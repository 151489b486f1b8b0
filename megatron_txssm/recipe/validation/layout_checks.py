"""Checks of a recipe's parallel layout. Each error gives name, value and remedy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_txssm.architecture.layer_pattern import in_stages, stages
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import check_divisible, data_parallel_size, divisors
from megatron_txssm.recipe.validation.expert_checks import check_expert_parallel


def check_tensor_parallel(recipe: Recipe) -> None:
    """UserError for the first width that tensor or sequence parallelism cannot divide."""
    model, size = recipe.model, recipe.parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(model, name)
        if value is not None:
            check_divisible(name, value, "tensor_model_parallel_size", size, _short_list(value))
    if model.ffn_hidden_size // size % 2 != 0:
        raise UserError(
            f"ffn_hidden_size={model.ffn_hidden_size} leaves {model.ffn_hidden_size // size} channels to each "
            f"tensor-parallel process, an odd number, which Megatron's SwiGLU warm-up cannot halve; "
            f"use {model.ffn_hidden_size + size}"
        )
    if recipe.state_space is not None:
        with recipe_names():
            recipe.state_space.check_tensor_parallel(size)
    multiple = recipe.data.make_vocab_size_divisible_by
    check_divisible(
        "make_vocab_size_divisible_by", multiple, "tensor_model_parallel_size", size, f"use a multiple of {size}"
    )
    if recipe.parallel.sequence_parallel:
        check_divisible(
            "seq_length / context_parallel_size",
            recipe.training.seq_length // recipe.parallel.context_parallel_size,
            "tensor_model_parallel_size",
            size,
            "or set sequence_parallel: false",
        )


def check_pipeline_and_context_parallel(recipe: Recipe) -> None:
    """UserError if the layers do not divide into stages, or a sequence into pieces."""
    parallel = recipe.parallel
    _check_stages(recipe)
    context, length = parallel.context_parallel_size, recipe.training.seq_length
    if context > 1 and length % (2 * context) != 0:
        raise UserError(
            f"seq_length={length} is not divisible by 2 x context_parallel_size={context}, the pieces of a sequence; "
            f"use a multiple of {2 * context}"
        )
    if recipe.state_space is not None:
        with recipe_names():
            recipe.state_space.check_context_parallel(context, parallel.tensor_model_parallel_size)
        piece, looks_back = length // (2 * context), recipe.state_space.conv_kernel - 1
        if context > 1 and recipe.state_space.conv_sizes and piece < looks_back:
            raise UserError(
                f"context_parallel_size={context} leaves pieces of {piece} tokens, fewer than the {looks_back} that "
                "the convolution reaches back; use a longer seq_length"
            )


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """UserError if so many processes do not divide into the recipe's layout and batch."""
    copies = data_parallel_size(recipe, world_size)
    check_expert_parallel(recipe, copies)
    micro, batch = recipe.training.micro_batch_size, recipe.global_batch_size
    if batch % (micro * copies) != 0:
        sizes = ", ".join(map(str, divisors(batch // copies)))
        fitting = f"use micro_batch_size of one of {sizes}" if batch % copies == 0 else "change global_batch_tokens"
        raise UserError(
            f"the global batch of {batch} samples (global_batch_tokens / seq_length) is not divisible by "
            f"micro_batch_size={micro} x {copies} data-parallel processes; with {copies} of them {fitting}"
        )
    pipeline = recipe.parallel.pipeline_model_parallel_size
    microbatches = batch // (micro * copies)
    if (recipe.parallel.virtual_pipeline_stages or 1) > 1 and microbatches % pipeline != 0:
        raise UserError(
            f"the interleaved schedule needs a multiple of pipeline_model_parallel_size={pipeline} "
            f"micro-batches a step, not {microbatches}; change micro_batch_size or global_batch_tokens"
        )


def _check_stages(recipe: Recipe) -> None:
    pipeline, virtual = recipe.parallel.pipeline_model_parallel_size, recipe.parallel.virtual_pipeline_stages or 1
    if virtual > 1 and pipeline == 1:
        raise UserError(f"virtual_pipeline_stages={virtual} needs pipeline_model_parallel_size above 1; leave it out")
    if in_stages(recipe.model.layer_pattern, recipe.pipeline_stages) is not None:
        return
    asked = f"pipeline_model_parallel_size={pipeline}" + (
        f" x virtual_pipeline_stages={virtual}" if virtual > 1 else ""
    )
    written, count = len(stages(recipe.model.layer_pattern)), len(recipe.layers)
    if written > 1:
        raise UserError(
            f"{asked} needs {recipe.pipeline_stages} stages, and layer_pattern is divided by | into {written}; "
            "change one of them, or write the pattern without | to divide it evenly"
        )
    raise UserError(
        f"the {count} layers of layer_pattern are not divisible by {asked}; use "
        f"{', '.join(str(size) for size in divisors(count) if size <= 64)} stages, or divide the pattern by |"
    )


@contextmanager
def recipe_names() -> Iterator[None]:
    """Translate the mixer's field names in error messages to the recipe's."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"^(num_groups|num_heads|head_dim)=", r"state_\1=", str(error))) from None


def _short_list(value: int) -> str:
    return f"use one of {', '.join(str(d) for d in divisors(value) if d <= 64)}"
