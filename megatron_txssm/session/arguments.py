"""Converts a recipe to Megatron's command line, and that to Megatron's namespace.

recipe/schema.py declares the fields, recipe/megatron_arguments/table.py the `megatron:` section. Megatron is imported
only for parsing, by its own parser with our arguments added.
"""

import argparse
import functools
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.megatron_arguments.section import passing
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIXED_ARGUMENTS, SECTIONS
from megatron_txssm.recipe.settings.setting import argument, section_fields
from megatron_txssm.recipe.sizes import data_parallel_size
from megatron_txssm.session.render import RENDERS


def megatron_arguments(recipe: Recipe) -> list[str]:
    """Megatron's command line for a recipe: the fixed arguments, each field's, then the `megatron:` section's."""
    words = [word for fixed in FIXED_ARGUMENTS for word in fixed]
    for name, section in SECTIONS.items():
        values = getattr(recipe, name)
        for field in section_fields(section):
            value = getattr(values, field.name)
            if render := RENDERS.get(f"{name}.{field.name}"):
                words += render(value, recipe)
            else:
                words += [word for flag in field.setting.flags for word in argument(flag, value)]
    # No positional words follow, which an argument with an unbounded list would swallow.
    return words + [word for key, value in recipe.megatron.items() for word in passing()[key].words(value)]


def whole_validation_arguments(recipe: Recipe, world_size: int) -> list[str]:
    """With full validation: one sample per data-parallel rank in each validation step.

    Megatron's loader then yields single samples and counts each as a step. With the training's batch sizes, each of a
    step's micro-batches would read the set again, and pipelines fail on samples that are smaller than a micro-batch.
    """
    if recipe.logging.eval_iters is not None:
        return []
    parallel = recipe.parallel
    # The interleaved schedule needs this many micro-batches per round, and reads the set as many times.
    micro_batches = parallel.pipeline_model_parallel_size if (parallel.virtual_pipeline_stages or 1) > 1 else 1
    samples = data_parallel_size(recipe, world_size) * micro_batches
    return ["--eval-micro-batch-size=1", f"--eval-global-batch-size={samples}"]


def parse_megatron_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Megatron's namespace for a command line, before Megatron's validation; UserError if its parser rejects it."""
    try:
        return _parser().parse_args(list(argv))
    except (AssertionError, KeyError, IndexError) as error:
        raise UserError(f"Megatron refuses the arguments: {error}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"Megatron's parser: {message}")


@functools.cache
def _parser() -> argparse.ArgumentParser:
    from megatron_txssm.model.arguments import add_transxssm_arguments

    # Warnings about missing GPU libraries are irrelevant here.
    with warnings.catch_warnings(action="ignore"):
        from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(prog="megatron", allow_abbrev=False, add_help=False)
    return add_transxssm_arguments(add_megatron_arguments(parser))
