"""txssm runs: list the runs in a folder."""

import argparse

from megatron_txssm.cli.parsing import Subparsers, add_verb


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "runs", ("txssm runs", "txssm runs /scratch/somebody/runs", "txssm runs runs/demo"))
    parser.add_argument(
        "folder", nargs="?", default="runs", help="a folder of runs, or one run (default: runs; for jobs: txssm jobs)"
    )


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.reporting.runs import list_runs

    return list_runs(args.folder)
