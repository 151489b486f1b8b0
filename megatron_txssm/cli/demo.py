"""txssm demo: from text to a trained model that generates text, on one machine without a GPU."""

import argparse

from megatron_txssm.cli.parsing import Subparsers, add_set_option, add_verb
from megatron_txssm.demo.demo import run_demo

EXAMPLES = ("txssm demo", "txssm demo --set training.train_iters=100")


def add_parser(subparsers: Subparsers) -> None:
    add_set_option(add_verb(subparsers, "demo", EXAMPLES))


def run(args: argparse.Namespace) -> int:
    return run_demo(args.overrides)
