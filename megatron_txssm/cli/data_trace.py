"""txssm data trace: the documents of a training step, with their sources and the rank that reads them."""

import argparse

from megatron_txssm.cli.parsing import add_set_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe with data.corpus; a run's own is runs/NAME/recipe.yaml")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="training step, from 1, as in the logs")
    parser.add_argument(
        "--sample", type=int, metavar="K", help="show only sample K of the global batch, from 0, with its text"
    )
    parser.add_argument(
        "--nproc", type=int, metavar="P", help="processes of the run (default: as few as the layout needs)"
    )
    add_set_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.training.trace import trace

    words = {"sample": args.sample, "nproc": args.nproc, "overrides": args.overrides, "as_json": args.json}
    return trace(args.recipe, args.step, **words)
