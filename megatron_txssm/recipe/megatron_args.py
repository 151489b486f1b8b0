"""From a recipe to Megatron's command line, and from there to Megatron's namespace.

The table of fields is schema.py; here are the `megatron:` section, which takes any other argument that Megatron's own
parser knows, and that parser with our arguments added. Megatron is imported only where that section, or a parse, needs
it.
"""

import argparse
import functools
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import nearest
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIXED_ARGUMENTS, SECTIONS
from megatron_txssm.recipe.setting import argument, section_fields, shown
from megatron_txssm.recipe.validate import data_parallel_size

# Arguments that would go round the recipe.
_REFUSED = {
    "--yaml-cfg": "it replaces every argument of the recipe",
    "--use-checkpoint-args": "it replaces arguments of the recipe",
    "--rotary-percent": "Unified RoPE rotates every channel of Q, K, C and B",
    "--rotary-interleaved": "Unified RoPE pairs the two halves of a vector",
}


def megatron_arguments(recipe: Recipe) -> list[str]:
    """Megatron's command line for a recipe: the fixed arguments, each field's, then the `megatron:` section's."""
    words = [word for fixed in FIXED_ARGUMENTS for word in fixed]
    for name, section in SECTIONS.items():
        values = getattr(recipe, name)
        for field in section_fields(section):
            words += field.setting.arguments(getattr(values, field.name), recipe)
    # After them stands nothing that takes a list without a bound, so a list's last word is never swallowed.
    return words + [word for key, value in recipe.megatron.items() for word in _passed_through(key, value)]


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


@functools.cache
def owners() -> dict[str, str]:
    """Megatron flag -> the dotted recipe field that sets it."""
    owned: dict[str, str] = {}
    for section_name, section in SECTIONS.items():
        for field in section_fields(section):
            for flag in (*field.setting.flags, *field.setting.owns):
                owned.setdefault(flag, f"{section_name}.{field.name}")
    return owned


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


@functools.cache
def _actions() -> dict[str, argparse.Action]:
    """Every spelling of every Megatron argument, with underscores: its flags, and its name in the namespace."""
    actions = _parser()._actions
    by_flag = {_spelling(flag): action for action in actions for flag in action.option_strings}
    return by_flag | {action.dest: action for action in actions}


def _spelling(key: str) -> str:
    return key.lstrip("-").replace("-", "_")


def _passed_through(key: str, value: Any) -> list[str]:
    """The words of one entry of the `megatron:` section."""
    name = f"megatron.{key}"
    action = _actions().get(_spelling(key))
    if action is None:
        raise UserError(f"{name}: Megatron has no such argument{nearest(_spelling(key), _actions())}")
    _refuse_owned(name, value, action)
    if value is None:
        return []
    # A flag without a value; False is Megatron's default, or the way to say the opposite of its name in the namespace.
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UserError(f"{name}={shown(value)} must be true or false")
        return _switch(key, value, action)
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and action.nargs is None:
        raise UserError(f"{name}={shown(value)} must be one value, not a list")
    if any(isinstance(item, bool) or item is None for item in items):
        raise UserError(
            f"{name}={shown(value)} must be {'values' if action.nargs else 'a value'}, not true, false or null"
        )
    # An enumeration's choices are known by their names.
    choices = [str(getattr(choice, "name", choice)) for choice in action.choices or ()]
    for item in map(str, items):
        if choices and item not in choices:
            raise UserError(f"{name}={shown(value)} must be one of {', '.join(choices)}{nearest(item, choices)}")
    if action.nargs is None:
        words = argument(action.option_strings[0], items[0])
    else:
        if any(isinstance(item, str) and item.startswith("-") for item in items):
            raise UserError(f"{name}={shown(value)} must not hold a value that begins with a dash")
        words = [action.option_strings[0], *map(str, items)]
    # Alone, so that a refusal is reported under the name in the recipe.
    try:
        parse_megatron_arguments(words)
    except UserError as error:
        raise UserError(f"{name}={shown(value)}: {error}") from None
    return words


def _refuse_owned(name: str, value: Any, action: argparse.Action) -> None:
    fixed = {words[0]: " ".join(words) for words in FIXED_ARGUMENTS}
    for flag in action.option_strings:
        if flag in owners():
            raise UserError(f"{name}={shown(value)}: set {owners()[flag]} instead, the recipe's field for {flag}")
        if flag in fixed:
            raise UserError(f"{name}={shown(value)}: every recipe has {fixed[flag]}; leave it out")
        if flag in _REFUSED:
            raise UserError(f"{name}={shown(value)}: {flag} is refused: {_REFUSED[flag]}")


def _switch(key: str, value: bool, action: argparse.Action) -> list[str]:
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag for flag in action.option_strings if flag.startswith("--no-") != value][:1]
    # By its name in the namespace, `overlap_p2p_comm: false` means --no-overlap-p2p-communication.
    by_dest = _spelling(key) == action.dest
    wanted = action.const if by_dest else True
    return [action.option_strings[0]] if value == wanted else []
