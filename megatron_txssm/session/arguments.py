"""From a recipe to Megatron's command line, and from there to Megatron's namespace.

The table of fields is recipe/schema.py, that of the `megatron:` section recipe/megatron_table.py. Megatron is imported
only for a parse, by its own parser with our arguments added.
"""

import argparse
import functools
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.megatron_section import passing
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIXED_ARGUMENTS, SECTIONS
from megatron_txssm.recipe.setting import argument, section_fields
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
    # After them stands nothing that takes a list without a bound, so a list's last word is never swallowed.
    return words + [word for key, value in recipe.megatron.items() for word in passing()[key].words(value)]


def whole_validation_arguments(recipe: Recipe, world_size: int) -> list[str]:
    """Where validation sets are read whole: one sample a data-parallel rank at each of validation's steps.

    Megatron's loader gives single samples there and counts a step for each; a step like those of training would read
    the set again for each of its micro-batches, and a pipeline fails on samples where it expects larger micro-batches.
    """
    if recipe.logging.eval_iters is not None:
        return []
    parallel = recipe.parallel
    # The interleaved schedule takes rounds of as many micro-batches only, and reads the set as many times.
    micro_batches = parallel.pipeline_model_parallel_size if (parallel.virtual_pipeline_stages or 1) > 1 else 1
    samples = data_parallel_size(recipe, world_size) * micro_batches
    return ["--eval-micro-batch-size=1", f"--eval-global-batch-size={samples}"]


def parse_megatron_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Megatron's namespace for a command line, not yet validated by Megatron; UserError where its parser refuses."""
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

    # Its warnings of missing GPU libraries are no matter of a command line.
    with warnings.catch_warnings(action="ignore"):
        from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(prog="megatron", allow_abbrev=False, add_help=False)
    return add_transxssm_arguments(add_megatron_arguments(parser))
