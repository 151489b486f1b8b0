"""txssm eval fetch: the data of tasks, into a folder."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import add_tasks_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what it has is kept")
    add_tasks_option(parser, ["paper"], "paper")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.evaluation.harness.local_data import fetch

    return fetch(args.folder, args.tasks)
