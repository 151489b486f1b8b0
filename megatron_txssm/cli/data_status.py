"""`txssm data status`: how far a corpus is."""

import argparse
import time

from megatron_txssm.data.corpus.status import CorpusStatus
from megatron_txssm.data.sharding.progress import print_status, progress

# Of --follow.
SECONDS_BETWEEN_LOOKS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", help="a corpus directory, or the name of its recipe")
    parser.add_argument("--follow", "-f", action="store_true", help="until all tasks are finished, or one has failed")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.sharding.plan import corpus_directory

    directory = corpus_directory(args.corpus)
    status = CorpusStatus(directory)
    if args.follow:
        with progress(status):
            while any(not subset.done and not subset.failed for subset in status.read()):
                time.sleep(SECONDS_BETWEEN_LOOKS)
    subsets = status.read()
    print_status(subsets)
    return 0
