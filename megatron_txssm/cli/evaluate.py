"""txssm evaluate: the former name of `txssm eval loss`."""

from megatron_txssm.cli.eval_loss import add_arguments, run
from megatron_txssm.cli.parsing import Subparsers, add_verb

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Subparsers) -> None:
    add_arguments(add_verb(subparsers, "evaluate", ("txssm eval loss runs/demo",)))
