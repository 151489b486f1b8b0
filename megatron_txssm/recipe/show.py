"""`txssm recipes`: the table of recipes, one recipe in full, its Megatron arguments, or the table of fields."""

import argparse
import shlex
import shutil
import sys
from typing import Any

from megatron_txssm.cli import add_verb
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe, recipe_names


def add_parser(subparsers: Any) -> None:
    parser = add_verb(
        subparsers,
        "recipes",
        [
            "txssm recipes",
            "txssm recipes transxssm_320m",
            "txssm recipes transxssm_320m --megatron-args --set parallel.tensor_model_parallel_size=2",
            "txssm recipes --fields",
        ],
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name or path; without one, all are listed")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field; repeatable")
    parser.add_argument("--megatron-args", action="store_true", help="print Megatron's command line for RECIPE")
    parser.add_argument("--fields", action="store_true", help="print every recipe field with its Megatron argument")


def run(args: argparse.Namespace) -> int:
    if args.fields:
        _print_fields()
    elif args.recipe is not None:
        _print_recipe(args.recipe, args.set, args.megatron_args)
    elif args.set or args.megatron_args:
        raise UserError("--set and --megatron-args need a RECIPE; `txssm recipes` lists them")
    else:
        _print_table()
    return 0


def _print_recipe(name: str, overrides: list[str], megatron: bool) -> None:
    recipe = load_recipe(name, overrides)
    if not megatron:
        print(recipe.to_yaml(), end="")
        return
    from megatron_txssm.recipe.megatron_args import megatron_arguments

    print(shlex.join(megatron_arguments(recipe)))


def _print_table() -> None:
    from megatron_txssm.planning.parameters import count_parameters

    columns = ["recipe", "layers", ">hidden", ">ffn", ">params", ">length", ">batch", ">lr"]
    # A narrow terminal has no room for the descriptions.
    descriptions = _width() >= 110
    table = _table(*columns, *(["about"] if descriptions else []))
    for name in recipe_names():
        recipe = load_recipe(name)
        model, training = recipe.model, recipe.training
        repeats = model.num_layers // len(model.layer_pattern)
        table.add_row(
            name,
            f"{repeats} x {model.layer_pattern}",
            str(model.hidden_size),
            str(model.ffn_hidden_size),
            f"{count_parameters(recipe).total / 1e6:,.1f}M",
            f"{training.seq_length:,}",
            f"{training.global_batch_tokens:,}",
            f"{recipe.optimizer.learning_rate:g}",
            *([recipe.description] if descriptions else []),
        )
    _print(table)
    print(
        "S: state-space layer, A: attention layer; length and batch in tokens. `txssm recipes NAME` shows one in full."
    )


def _print_fields() -> None:
    from dataclasses import MISSING

    from megatron_txssm.recipe.recipe import Recipe
    from megatron_txssm.recipe.schema import SECTIONS
    from megatron_txssm.recipe.setting import section_fields, type_name

    table = _table("field", "type", "default", "meaning", "Megatron argument")
    for name, section in {"": Recipe, **SECTIONS}.items():
        for field in section_fields(section):
            rules = field.setting
            default = (
                "required" if field.default is MISSING else "null" if field.default is None else str(field.default)
            )
            kind = " | ".join(rules.choices) or type_name(field.type)
            dotted = f"{name}.{field.name}".lstrip(".")
            table.add_row(dotted, kind, default, rules.explanation, " ".join(rules.flags))
    table.add_row("megatron.*", "any", "", "any other Megatron argument, by its name or flag", "that argument")
    _print(table)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        # The names wrap nowhere; what is said about them may.
        wraps = column in ("about", "meaning", "type")
        justify = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=not wraps)
    return table


def _width() -> int:
    # Into a file or pipe, one row stays one line.
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 240


def _print(table: Any) -> None:
    from rich.console import Console

    Console(markup=False, width=_width()).print(table)
