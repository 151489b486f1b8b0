"""txssm data blend: the tokens and epochs that a recipe draws from each subset, and Megatron's arguments for that."""

import argparse

from megatron_txssm.cli.parsing import add_set_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="RECIPE_OR_DIR",
        help="a recipe with data.corpus, or a corpus directory (its subsets in proportion to their tokens)",
    )
    parser.add_argument(
        "--tokens",
        type=_tokens,
        metavar="N",
        help="training tokens (default: the recipe's; for a directory, all tokens once)",
    )
    add_set_option(parser)
    parser.add_argument("--megatron-args", action="store_true", help="print only Megatron's arguments")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.corpus.show_blend import show_blend

    words = {"tokens": args.tokens, "overrides": args.overrides, "megatron_args": args.megatron_args}
    return show_blend(args.source, **words)


def _tokens(text: str) -> int:
    """Parse a whole number, such as 6400000000, 6_400_000_000 or 6.4e9."""
    number = float(text)
    if not 1 <= number < 2**63 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of tokens, such as 6.4e9")
    return int(number)
