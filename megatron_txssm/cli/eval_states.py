"""txssm eval states: the norms of recurrent states over position."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import add_set_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_set_option(parser)
    parser.add_argument("runs", metavar="CHECKPOINT", type=Path, nargs="+", help="folders of runs")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where results go (default for one run: RUN/evaluation/states_N)"
    )
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a sample (default: 4 x the training's)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="validation samples (default: 8)")
    parser.add_argument(
        "--every", type=int, default=256, metavar="N", help="tokens between measured positions (default: 256)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoints (default: the newest)")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.studies.states import compare_states

    return compare_states(
        args.runs,
        args.output,
        length=args.length,
        samples=args.samples,
        every=args.every,
        step=args.step,
        overrides=args.overrides,
    )
