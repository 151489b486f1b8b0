"""txssm eval length: the loss beyond the training's length."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import add_run_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder; results go to RUN/evaluation/length_N")
    parser.add_argument("--seq-length", type=int, metavar="N", help="tokens of a sample (default: 4 x the training's)")
    parser.add_argument(
        "--parts",
        type=int,
        default=16,
        metavar="N",
        help="equal parts of a sample, each with its loss (default: 16)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.studies.length import evaluate_length

    return evaluate_length(
        args.run,
        seq_length=args.seq_length,
        parts=args.parts,
        step=args.step,
        overrides=args.overrides,
        nproc=args.nproc,
        port=args.port,
    )
