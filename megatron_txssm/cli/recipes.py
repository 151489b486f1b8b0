"""`txssm recipes`: the table of recipes, one recipe in full, its Megatron arguments, a check, or all fields."""

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
            "txssm recipes my_recipe.yaml --check --gpus 64",
            "txssm recipes --fields",
        ],
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name or path (default: list all recipes)")
    add_set_option(parser)
    parser.add_argument("--megatron-args", action="store_true", help="print Megatron's command line for RECIPE")
    parser.add_argument("--check", action="store_true", help="build RECIPE's model, optimizer and schedule, on no GPU")
    parser.add_argument("--gpus", type=int, metavar="N", help="processes of --check (default: as few as can be)")
    parser.add_argument("--fields", action="store_true", help="print every recipe field with its Megatron argument")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.recipe.catalogue import show_fields, show_recipes
    from megatron_txssm.session.show_recipe import show_recipe

    if args.fields:
        return show_fields()
    if args.gpus is not None and not args.check:
        raise UserError(f"--gpus {args.gpus} goes with --check")
    if args.recipe is not None and args.check:
        from megatron_txssm.evaluation.harness.stated import check_stated_tasks
        from megatron_txssm.planning.check_build import check_recipe

        return check_recipe(args.recipe, overrides=args.overrides, gpus=args.gpus, check=check_stated_tasks)
    if args.recipe is not None:
        return show_recipe(args.recipe, overrides=args.overrides, megatron_args=args.megatron_args)
    if args.overrides or args.megatron_args or args.check:
        raise UserError("--set, --megatron-args and --check need a RECIPE; `txssm recipes` lists them")
    return show_recipes()
