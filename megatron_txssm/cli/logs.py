"""txssm logs: show the output of a run, or of its newest job; with -f, follow it until it is over."""

import argparse

from megatron_txssm.cli.parsing import Subparsers, add_verb
from megatron_txssm.jobs.logs import show_logs

EXAMPLES = (
    "txssm logs runs/transxssm_1.3b",
    "txssm logs -f transxssm_1.3b",
    "txssm logs 17 --lines 200",
    "txssm logs demo_cpu --rank 3",
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "logs", EXAMPLES)
    parser.add_argument("run", help="a folder (of a run, a submitted evaluation), a name in runs/, or a job's number")
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="also print new output until the run or job has ended (Ctrl-C stops the printing, not the run)",
    )
    parser.add_argument(
        "--lines", type=int, default=40, metavar="N", help="number of existing lines to print (default: 40)"
    )
    parser.add_argument(
        "--stage", help="stage of a chain: pretrain, convert, evaluate, harness (default: pretrain, or the only one)"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="show this rank's log instead (without Slurm: rank 0's)")


def run(args: argparse.Namespace) -> int:
    return show_logs(args.run, follow=args.follow, lines=args.lines, stage=args.stage, rank=args.rank)
