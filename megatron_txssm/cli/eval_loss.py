"""txssm eval loss: the loss of a run's checkpoint on all its validation data."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import add_run_options
from megatron_txssm.evaluation.evaluate import evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--by-position", type=int, metavar="N", help="also the loss in N equal parts of the samples, first tokens first"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where results go (default: RUN/evaluation)")


def run(args: argparse.Namespace) -> int:
    return evaluate(
        args.run,
        step=args.step,
        by_position=args.by_position,
        output=args.output,
        overrides=args.overrides,
        nproc=args.nproc,
        port=args.port,
    )
