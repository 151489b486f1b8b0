"""`txssm recipes`: the table of recipes, one recipe in full, its Megatron arguments, or the table of fields."""

import argparse

from megatron_txssm.cli.parsing import Subparsers, add_set_option, add_verb
from megatron_txssm.errors import UserError


def add_parser(subparsers: Subparsers) -> None:
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
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name or path (default: list all recipes)")
    add_set_option(parser)
    parser.add_argument("--megatron-args", action="store_true", help="print Megatron's command line for RECIPE")
    parser.add_argument("--fields", action="store_true", help="print every recipe field with its Megatron argument")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.recipe.catalogue import show_fields, show_recipes
    from megatron_txssm.session.show_recipe import show_recipe

    if args.fields:
        return show_fields()
    if args.recipe is not None:
        return show_recipe(args.recipe, overrides=args.overrides, megatron_args=args.megatron_args)
    if args.overrides or args.megatron_args:
        raise UserError("--set and --megatron-args need a RECIPE; `txssm recipes` lists them")
    return show_recipes()
