"""`txssm data verify`: list faulty tasks, and optionally remove them."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", help="a corpus directory, or the name of its recipe")
    parser.add_argument("--redo", action="store_true", help="remove faulty tasks, so that `data shard` redoes them")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.corpus.verify import verify_corpus

    return verify_corpus(args.corpus, redo=args.redo)
