"""txssm evaluate: the loss of a run's checkpoint on all its validation data."""

import argparse
from pathlib import Path

from megatron_txssm.cli.parsing import Subparsers, add_run_options, add_verb
from megatron_txssm.evaluation.evaluate import evaluate

EXAMPLES = (
    "txssm evaluate runs/demo",
    "txssm evaluate runs/demo --step 100",
    "txssm evaluate runs/demo --set parallel.tensor_model_parallel_size=1",
    "srun txssm evaluate runs/transxssm_1.3b",
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "evaluate", EXAMPLES)
    add_run_options(parser)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder; results go to RUN/evaluation")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")


def run(args: argparse.Namespace) -> int:
    return evaluate(args.run, step=args.step, overrides=args.overrides, nproc=args.nproc, port=args.port)
