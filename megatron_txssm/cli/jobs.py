"""txssm jobs: list this user's Slurm jobs, and the progress of their runs."""

import argparse

from megatron_txssm.cli.parsing import Subparsers, add_verb
from megatron_txssm.jobs.goodput import print_goodput
from megatron_txssm.jobs.listing import list_jobs


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "jobs", ("txssm jobs", "txssm jobs --goodput"))
    parser.add_argument(
        "--goodput", action="store_true", help="show how well every run in runs/ and in the queue used its time"
    )


def run(args: argparse.Namespace) -> int:
    return print_goodput() if args.goodput else list_jobs()
