"""`txssm data combine`: one corpus of several, which shares their shards."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError

if TYPE_CHECKING:
    from megatron_txssm.data.corpus.combine import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder of the new corpus; it must not exist")
    parser.add_argument(
        "corpora",
        nargs="+",
        metavar="CORPUS[=PREFIX]",
        help="finished corpora of one tokenizer, by directory or name of the recipe; "
        "with a PREFIX, subset web becomes PREFIX-web",
    )


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.corpus.combine import combine
    from megatron_txssm.terminal import print_table

    if len(args.corpora) < 2:
        raise UserError(f"one corpus, {args.corpora[0]}, is given; name two or more to combine")
    sources = [_source(word) for word in args.corpora]
    corpus = combine(Path(args.out), sources)
    rows = [
        (name, f"{len(s.manifests):,}", f"{s.tokens('train'):,}", f"{s.tokens('validation'):,}")
        for name, s in corpus.subsets.items()
    ]
    print_table(("subset", ">tasks", ">tokens", ">held out"), rows)
    originals = ", ".join(dict.fromkeys(str(source.directory) for source in sources))
    print(f"{corpus.directory} links to {originals}, which must stay")
    return 0


def _source(word: str) -> "Source":
    from megatron_txssm.data.corpus.combine import Source
    from megatron_txssm.data.sharding.plan import corpus_directory

    # A path may hold "=", too.
    name, equals, prefix = word.rpartition("=")
    if not equals or os.path.exists(word):
        return Source(corpus_directory(word))
    return Source(corpus_directory(name), prefix)
