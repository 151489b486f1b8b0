"""`txssm data status`: show the progress of a corpus."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", help="a corpus directory, or the name of its recipe")
    parser.add_argument(
        "--follow", "-f", action="store_true", help="show the progress until all tasks are finished or one has failed"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.sharding.progress import show_status

    return show_status(args.corpus, follow=args.follow)
