"""txssm plot: draw the curves of runs."""

import argparse

from megatron_txssm.cli.parsing import Subparsers, add_verb

EXAMPLES = (
    "txssm plot runs/demo",
    "txssm plot runs/a runs/b --over tokens --panel loss gradient throughput",
    "txssm plot small large --over flops --smooth 200 --output scaling.svg",
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "plot", EXAMPLES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a name under runs/")
    parser.add_argument(
        "--panel",
        nargs="+",
        default=["loss"],
        metavar="NAME",
        help="what to draw, one below the other: loss (default), validation, throughput, gradient, learning_rate",
    )
    parser.add_argument("--over", default="steps", help="steps (default), tokens or flops")
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="steps of the running mean (default: a fortieth of each run; 1: none)"
    )
    parser.add_argument(
        "--output", default="plot.png", metavar="FILE", help="a .png, .svg or .pdf file (default: plot.png)"
    )


def run(args: argparse.Namespace) -> int:
    import os

    from megatron_txssm.jobs.attempts import find_run
    from megatron_txssm.reporting.plot import plot_runs

    runs = [run if os.path.isdir(run) else find_run(run) for run in args.runs]
    print(plot_runs(runs, os.path.expanduser(args.output), panels=args.panel, over=args.over, smooth=args.smooth))
    return 0
