"""The one way to start Megatron in this process."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError, described
from megatron_txssm.platform import prepare_platform
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.megatron_arguments.section import of_gpus
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.fp8_checks import check_fp8_on
from megatron_txssm.session.arguments import megatron_arguments, parse_megatron_arguments

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from megatron.training.models.hybrid import HybridModelConfig

    from megatron_txssm.compat import MegatronArguments


def start_megatron(
    recipe: Recipe, *, before: Sequence[str] = (), after: Sequence[str] = (), trains: bool = True
) -> "MegatronArguments":
    """Megatron's arguments for a recipe, parsed and validated by Megatron, for the rank given by the environment.

    Call it before Megatron is imported. `before` and `after`: further arguments, placed before or after the recipe's
    own; later ones override earlier ones. `trains` False: without a GPU, entries of the `megatron:` section that need
    one are left out, with a message. UserError if this machine or Megatron rejects the arguments.
    """
    prepare_kernels(recipe)
    platform_arguments = prepare_platform()
    if not trains:
        recipe = _without_gpu_entries(recipe)
    check_gpu(recipe)
    from megatron_txssm.compat import mend_megatron

    mend_megatron()
    return initialize_arguments([*before, *megatron_arguments(recipe), *after, *platform_arguments])


def check_gpu(recipe: Recipe) -> None:
    """UserError if this process's GPU, or the lack of one, does not support the recipe."""
    import torch

    if not torch.cuda.is_available():
        if names := of_gpus(recipe.megatron):
            raise UserError(f"megatron.{names[0]}={recipe.megatron[names[0]]} needs a GPU; set it to null here")
        return
    try:
        # 92000 is cuDNN 9.20.0.
        cudnn = torch.backends.cudnn.version() or 0
    except RuntimeError as error:
        raise UserError(f"{error}; run without LD_LIBRARY_PATH, or with torch's own cuDNN first in it") from error
    check_fp8_on(recipe, torch.cuda.get_device_capability(), (cudnn // 10000, cudnn // 100 % 100, cudnn % 100))


def _without_gpu_entries(recipe: Recipe) -> Recipe:
    import torch

    if torch.cuda.is_available():
        return recipe
    names = of_gpus(recipe.megatron)
    for name in names:
        print(f"megatron.{name}={recipe.megatron[name]} needs a GPU; without one, it is left out", flush=True)
    return changed(recipe, {f"megatron.{name}": None for name in names})


def prepare_kernels(recipe: Recipe) -> None:
    """Set the variables that mamba-ssm and Triton read.

    Under Megatron's --deterministic-mode, mamba-ssm's kernels are deterministic; otherwise their tuning is cached.
    Call it before mamba-ssm is imported, which Megatron itself does too early. Otherwise the kernels would avoid
    atomics, but use the block sizes that each run finds fastest.
    """
    # Products and sums are fused, as by every Triton up to 3.9, which announces another default for 3.10.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if recipe.megatron.get("deterministic_mode"):
        os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
        # It would make mamba-ssm try block sizes anyway, and each node keep its own result.
        os.environ.pop("TRITON_CACHE_AUTOTUNING", None)
    else:
        # The next start, and the next process of this node, need not repeat the tuning, which takes half a minute.
        os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")


def initialize_arguments(arguments: list[str]) -> "MegatronArguments":
    """Megatron's global arguments, parsed and validated by Megatron; UserError if it rejects them."""
    from megatron.training.arguments import parse_and_validate_args

    from megatron_txssm.model.arguments import add_transxssm_arguments

    parse_megatron_arguments(arguments)  # for a clear message if a value does not parse
    sys.argv[1:] = arguments
    try:
        return parse_and_validate_args(extra_args_provider=add_transxssm_arguments)
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron refuses the arguments: {_reason(error)}") from error


def end_at_once_on_sigterm(args: "MegatronArguments") -> None:
    """For a process that does not train: Megatron's handler waits for the end of a step, which never comes."""
    from megatron.training.global_vars import get_signal_handler

    if args.exit_signal_handler and (handler := get_signal_handler()) is not None:
        handler.release()
        args.exit_signal_handler = False


def _reason(error: AssertionError | ValueError) -> str:
    return str(error) or described(error)


def model_config(args: "MegatronArguments") -> "HybridModelConfig":
    """Megatron's HybridModelConfig, whose builder initialises every weight from the seed and its name."""
    from megatron.training.argument_utils import hybrid_config_from_args

    from megatron_txssm.model.initialization import initialize_by_name

    def initialize(stages: "list[MegatronModule]") -> "list[MegatronModule]":
        for stage in stages:
            initialize_by_name(stage, args.seed)
        return stages

    config = hybrid_config_from_args(args)
    config.pre_wrap_hooks.append(initialize)
    return config


@contextmanager
def megatron_initialized(recipe: Recipe, world_size: int) -> "Iterator[MegatronArguments]":
    """Megatron's global arguments and tokenizer as on rank 0 of `world_size` processes, without starting them."""
    platform_arguments = prepare_platform()
    from megatron.training import global_vars
    from megatron.training.arguments import parse_args, validate_args

    from megatron_txssm.compat import mend_megatron
    from megatron_txssm.model.arguments import add_transxssm_arguments

    mend_megatron()
    words, environment = sys.argv[1:], dict(os.environ)
    arguments = [*megatron_arguments(recipe), *platform_arguments]
    # For a clear message if a value does not parse.
    parse_megatron_arguments(arguments)
    sys.argv[1:] = arguments
    os.environ.update(RANK="0", WORLD_SIZE=str(world_size))
    try:
        args = parse_args(add_transxssm_arguments)
        try:
            validate_args(args)
        except (AssertionError, ValueError) as error:
            raise UserError(f"Megatron refuses the arguments: {_reason(error)}") from error
        global_vars.set_args(args)
        global_vars.rebuild_tokenizer(args)
        yield args
    finally:
        global_vars.unset_global_variables()
        sys.argv[1:] = words
        os.environ.clear()
        os.environ.update(environment)
