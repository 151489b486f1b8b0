"""txssm eval needle: a number hidden in a long text."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import add_run_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument(
        "models", metavar="CHECKPOINT_OR_HF", type=Path, nargs="+", help="runs, checkpoints, or Hugging Face folders"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="results; goes on where it was")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        required=True,
        metavar="N",
        help="tokens of a text, its question and answer",
    )
    parser.add_argument(
        "--depths",
        type=int,
        default=5,
        metavar="N",
        help="places of the number, from beginning to end (default: 5)",
    )
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="questions of each (default: 10)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="prose to hide it in (default: Python's manual)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="texts in a batch (default: 1)")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.studies.needle import evaluate_needle

    return evaluate_needle(
        args.models,
        args.output,
        lengths=args.lengths,
        depths=args.depths,
        samples=args.samples,
        text=args.text,
        batch_size=args.batch_size,
        overrides=args.overrides,
        nproc=args.nproc,
        port=args.port,
    )
