"""`txssm data shard`: make a corpus on processes of this machine, or as job arrays."""

import argparse

from megatron_txssm.cli.parsing import add_set_option
from megatron_txssm.errors import require_positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a name in recipes/corpora/, a YAML file, or a corpus directory to resume")
    parser.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: one per core)")
    parser.add_argument("--slurm", action="store_true", help="submit job arrays instead, one per subset")
    parser.add_argument("--plan", action="store_true", help="only list the sources and their division into tasks")
    add_set_option(parser)


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.sharding.make import shard_corpus, show_plan, submit_corpus

    require_positive(workers=args.workers)
    if args.plan:
        return show_plan(args.recipe, overrides=args.overrides)
    if args.slurm:
        return submit_corpus(args.recipe, overrides=args.overrides)
    return shard_corpus(args.recipe, overrides=args.overrides, workers=args.workers)
