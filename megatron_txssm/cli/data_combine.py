"""`txssm data combine`: make one corpus of several; it shares their shards."""

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_txssm.data.corpus.combine import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder of the new corpus; it must not exist")
    parser.add_argument(
        "corpora",
        nargs="+",
        metavar="CORPUS[=PREFIX]",
        help="finished corpora with the same tokenizer, by directory or recipe name; "
        "with a PREFIX, subset web becomes PREFIX-web",
    )


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.corpus.combine import combine_corpora

    return combine_corpora(args.out, [_source(word) for word in args.corpora])


def _source(word: str) -> "Source":
    from megatron_txssm.data.corpus.combine import Source
    from megatron_txssm.data.corpus.manifest import corpus_directory

    # A path may also contain "=".
    name, equals, prefix = word.rpartition("=")
    if not equals or os.path.exists(word):
        return Source(corpus_directory(word))
    return Source(corpus_directory(name), prefix)
