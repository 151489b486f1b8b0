"""txssm pretrain: train in the processes of torchrun or srun, or in processes that it starts itself."""

import argparse

from megatron_txssm.cli.parsing import Subparsers, add_run_options, add_verb
from megatron_txssm.evaluation.harness.in_training import train_and_score
from megatron_txssm.training.processes import pretrain

EXAMPLES = (
    "txssm pretrain demo_cpu",
    "txssm pretrain demo_cpu --nproc 4 --set parallel.pipeline_model_parallel_size=2",
    "torchrun --nnodes 2 --nproc-per-node 8 … $(which txssm) pretrain transxssm_1.3b",
    "srun txssm pretrain transxssm_1.3b",
)


def add_parser(subparsers: Subparsers) -> None:
    parser = add_verb(subparsers, "pretrain", EXAMPLES)
    add_run_options(parser)
    parser.add_argument("recipe", help="a name that `txssm recipes` lists, or a YAML file")


def run(args: argparse.Namespace) -> int:
    return pretrain(args.recipe, work=train_and_score, overrides=args.overrides, nproc=args.nproc, port=args.port)
