"""Checks of a recipe's FP8 fields, and of a GPU's support for them. docs/fp8.md has the table and the sources.

Rejects settings that Transformer Engine 2.20.2 and Megatron-Core 0.19.2 would silently drop, or have no kernel for,
which would show only after the whole job has started.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError

if TYPE_CHECKING:
    from megatron_txssm.recipe.recipe import Recipe

# Compute capabilities.
ADA, HOPPER, BLACKWELL, BLACKWELL_DESKTOP = (8, 9), (9, 0), (10, 0), (12, 0)


def check_fp8(recipe: "Recipe") -> None:
    """UserError for FP8 settings that no GPU supports together, or for GEMM sizes that FP8 does not support."""
    training = recipe.training
    if training.fp8 is None:
        _check_options_without_fp8(recipe)
        return
    if training.precision != "bf16":
        raise UserError(f"training.fp8={training.fp8} needs training.precision=bf16, not {training.precision}")
    _check_bf16_layers(recipe)
    if training.fp8_attention:
        _check_attention(recipe)
    # Emulation supports any size.
    if training.transformer_impl != "local":
        _check_gemms(recipe)


def check_fp8_on(recipe: "Recipe", capability: tuple[int, int], cudnn: tuple[int, int, int]) -> None:
    """UserError if a GPU of this compute capability, with this cuDNN, does not support the recipe's FP8 settings.

    Only for Transformer Engine: emulation, with local modules, runs on any device.
    """
    training = recipe.training
    if training.fp8 is None or training.transformer_impl == "local":
        return
    gpu = f"this GPU (compute capability {_dotted(capability)})"
    least = {"delayed": ADA, "tensorwise": ADA, "blockwise": HOPPER, "mxfp8": BLACKWELL}[training.fp8_recipe]
    if capability < least:
        raise UserError(
            f"training.fp8_recipe={training.fp8_recipe} needs compute capability {_dotted(least)} or more, not {gpu}; "
            + ("set training.fp8=null" if capability < ADA else "use training.fp8_recipe=delayed or tensorwise")
        )
    if training.fp8_recipe == "mxfp8" and capability >= BLACKWELL_DESKTOP:
        raise UserError(f"training.fp8_recipe=mxfp8 has no GEMM in all layouts on {gpu}; use tensorwise")
    if training.fp8_attention:
        reason = _no_attention(recipe, capability, cudnn)
        if reason:
            raise UserError(f"training.fp8_attention=true on {gpu}: {reason}")


def _no_attention(recipe: "Recipe", capability: tuple[int, int], cudnn: tuple[int, int, int]) -> str | None:
    """Why Transformer Engine has no FP8 attention for the recipe on this GPU, with the remedy; None if it has."""
    if os.environ.get("NVTE_DPA_FP8_RECIPE"):
        return "NVTE_DPA_FP8_RECIPE would override or drop attention's FP8 recipe; unset it"
    if capability < HOPPER or capability >= BLACKWELL_DESKTOP:
        return "it has no FP8 attention; set training.fp8_attention=false"
    way = recipe.training.fp8_recipe
    if capability < BLACKWELL:
        if way != "delayed":
            return f"training.fp8_recipe={way} has FP8 attention from Blackwell on; use delayed, or fp8_attention=false"
        if recipe.kv_channels != 128:
            return (
                f"the backward pass only supports attention heads of 128 channels, not {recipe.kv_channels}; set "
                f"{_heads_of_128(recipe)}, or fp8_attention=false"
            )
    if way == "tensorwise" and cudnn < (9, 14, 0):
        return f"training.fp8_recipe=tensorwise needs cuDNN 9.14 or newer for it, not {_dotted(cudnn)}"
    if way == "mxfp8" and (cudnn < (9, 21, 0) or cudnn in ((9, 23, 0), (9, 23, 1))):
        return (
            f"training.fp8_recipe=mxfp8 needs cuDNN 9.21 or newer for it (9.23.0 and 9.23.1 are broken), "
            f"not {_dotted(cudnn)}; set fp8_attention=false, or use delayed or tensorwise"
        )
    return None


def _heads_of_128(recipe: "Recipe") -> str:
    hidden = recipe.model.hidden_size
    return f"model.num_attention_heads={hidden // 128}" if hidden % 128 == 0 else "model.kv_channels=128"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _check_options_without_fp8(recipe: "Recipe") -> None:
    training = recipe.training
    options = {"fp8_recipe": "delayed", "fp8_attention": False, "first_last_layers_bf16": 0}
    for name, default in options.items():
        value = getattr(training, name)
        if value != default:
            shown = str(value).lower()
            raise UserError(f"training.{name}={shown} has no effect without training.fp8; set fp8, or leave it out")


def _check_bf16_layers(recipe: "Recipe") -> None:
    """Rejects what Megatron's TransformerConfig would reject after the job has started."""
    training, layers = recipe.training, recipe.training.first_last_layers_bf16
    if layers == 0:
        return
    if training.fp8_recipe == "delayed":
        raise UserError(
            f"training.first_last_layers_bf16={layers} is not possible with training.fp8_recipe=delayed, whose maxima "
            "are reduced once for all layers; use tensorwise, blockwise or mxfp8, or 0"
        )
    count = len(recipe.layers)
    most = min(count // recipe.parallel.pipeline_model_parallel_size, (count - 1) // 2)
    if layers > most:
        raise UserError(f"training.first_last_layers_bf16={layers} leaves no layer to FP8; use at most {most}")


def _check_attention(recipe: "Recipe") -> None:
    training = recipe.training
    if not recipe.has_attention:
        raise UserError(
            f"training.fp8_attention=true has no effect: layer_pattern={recipe.model.layer_pattern} has no attention; "
            "leave it out"
        )
    if training.fp8_recipe == "blockwise":
        raise UserError(
            "training.fp8_attention=true would be dropped by Megatron with training.fp8_recipe=blockwise, for which "
            "Transformer Engine has no FP8 attention; use delayed (Hopper) or tensorwise (Blackwell)"
        )
    if recipe.data.isolate_documents:
        # According to the messages in Transformer Engine's library; torch 2.13 comes with cuDNN 9.20.
        raise UserError(
            "training.fp8_attention=true does not work with data.isolate_documents=true: FP8 attention trains on "
            "packed documents only on Blackwell with cuDNN 9.23; set one of them to false"
        )
    if recipe.kv_channels > 128 or recipe.kv_channels % 16 != 0:
        raise UserError(
            f"training.fp8_attention=true needs attention heads with a multiple of 16 channels, up to 128, "
            f"not {recipe.kv_channels}; set {_heads_of_128(recipe)}"
        )


def _check_gemms(recipe: "Recipe") -> None:
    """Checks every side of every FP8 GEMM of a rank, since each is a row's length in the forward or a backward GEMM.

    The LM head and the embedding stay in bf16, so the vocabulary size is unrestricted.
    """
    way = recipe.training.fp8_recipe
    multiple = 32 if way == "mxfp8" else 16
    for what, size, remedy in _gemm_sides(recipe, multiple):
        if size % multiple != 0:
            raise UserError(
                f"training.fp8={recipe.training.fp8} with fp8_recipe={way} needs multiples of {multiple}, "
                f"but on a rank {what.format(size)}; {remedy}"
            )


def _gemm_sides(recipe: "Recipe", multiple: int) -> Iterator[tuple[str, int, str]]:
    """(description, size on a tensor-parallel rank, remedy)."""
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    ranks = parallel.tensor_model_parallel_size
    # Under sequence parallelism a rank rounds its own tokens before they are gathered.
    shared = parallel.context_parallel_size * (ranks if parallel.sequence_parallel else 1)
    tokens = training.seq_length * training.micro_batch_size // shared
    yield "a micro-batch has {} tokens", tokens, f"use a seq_length that is a multiple of {multiple * shared}"
    yield "the hidden size is {}", model.hidden_size, f"use hidden_size of {_nearest(model.hidden_size, multiple)}"
    ffn = f"use ffn_hidden_size of {_nearest(model.ffn_hidden_size, multiple * ranks)}"
    yield "the FFN has {} channels", model.ffn_hidden_size // ranks, ffn
    for name, what in (("moe_ffn_hidden_size", "an"), ("moe_shared_expert_intermediate_size", "the shared")):
        if (channels := getattr(model, name)) is not None:
            yield (
                f"{what} expert has {{}} channels",
                channels // ranks,
                f"use {name} of {_nearest(channels, multiple * ranks)}",
            )
    if recipe.has_attention:
        channels = f"use kv_channels of {_nearest(recipe.kv_channels, multiple)}"
        heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
        yield "attention has {} channels", heads * recipe.kv_channels // ranks, channels
        yield "the projection to Q, K, V has {} rows", (heads + 2 * groups) * recipe.kv_channels // ranks, channels
    if recipe.state_space is not None:
        # The mixer pads its in-projection's rows.
        remedy = _legal_state_heads(recipe, multiple)
        yield "the state space has {} channels", recipe.state_space.inner_size // ranks, remedy


def _nearest(value: int, multiple: int) -> str:
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)


def _legal_state_heads(recipe: "Recipe", multiple: int) -> str:
    """The nearest numbers of state-space heads that are divisible into groups and give whole multiples on a rank."""
    state_space, ranks = recipe.state_space, recipe.parallel.tensor_model_parallel_size
    assert state_space is not None

    def fits(heads: int) -> bool:
        return heads % state_space.num_groups == 0 and heads * state_space.head_dim % (multiple * ranks) == 0

    stated = state_space.num_heads
    # Every multiple of the period fits.
    period = multiple * ranks * state_space.num_groups
    nearest = [
        next(filter(fits, range(stated - 1, 0, -1)), None),
        next(filter(fits, range(stated + 1, stated + period + 1)), None),
    ]
    heads = " or ".join(str(number) for number in nearest if number)
    return f"use {f'state_num_heads of {heads}, or ' if heads else ''}another state_head_dim, or fewer ranks"
