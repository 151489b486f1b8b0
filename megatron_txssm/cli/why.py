"""txssm why: why a run's last attempt ended, and what to do."""

import argparse

from megatron_txssm.cli.parsing import Subparsers, add_verb
from megatron_txssm.jobs.diagnosis.explain import explain

EXAMPLES = ("txssm why runs/transxssm_1.3b", "txssm why 17", "txssm why transxssm_1.3b --all")


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "why", EXAMPLES)
    parser.add_argument("run", help="a folder (of a run, a submitted evaluation), a name in runs/, or a job's number")
    parser.add_argument("--all", action="store_true", help="one line for every attempt")


def run(args: argparse.Namespace) -> int:
    return explain(args.run, every_attempt=args.all)
