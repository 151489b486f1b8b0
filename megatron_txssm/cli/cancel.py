"""txssm cancel: end a run's jobs; the trainer finishes its step and saves in the time that Slurm grants."""

import argparse

from megatron_txssm.cli.parsing import Subparsers, add_verb
from megatron_txssm.jobs.cancel import cancel

EXAMPLES = ("txssm cancel runs/transxssm_1.3b", "txssm cancel 17")


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "cancel", EXAMPLES)
    parser.add_argument("run", help="a folder (of a run, a submitted evaluation), a name in runs/, or a job's number")


def run(args: argparse.Namespace) -> int:
    return cancel(args.run)
