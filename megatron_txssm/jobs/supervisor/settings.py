"""The supervisor's settings: written by `txssm submit` into the batch script, read by the supervisor."""

import argparse
from dataclasses import dataclass

from megatron_txssm.jobs.limits import DEFAULTS, LIMIT_OPTIONS, Limits


@dataclass(frozen=True)
class Settings:
    """The supervisor's command line."""

    # A file; if started by hand, also a recipe's name.
    recipe: str
    # Values of --set.
    overrides: tuple[str, ...] = ()
    # Number of nodes to train on; the job's others are spare. 0: all.
    nodes: int = 0
    limits: Limits = DEFAULTS

    @property
    def words(self) -> list[str]:
        words = [self.recipe, *(word for text in self.overrides for word in ("--set", text)), *self.limits.words]
        return [*words, f"--nodes={self.nodes}"] if self.nodes else words


def parse_settings(argv: list[str] | None = None) -> Settings:
    """The settings in a command line; None: in this process's."""
    parser = argparse.ArgumentParser(prog="supervisor")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--nodes", type=int, default=0, help="to train on; the job's others are spare (default: all)")
    for limit in LIMIT_OPTIONS:
        parser.add_argument(limit.option, type=int, metavar=limit.unit, default=limit.default, help=limit.help)
    args = parser.parse_args(argv)
    return Settings(args.recipe, tuple(args.overrides), args.nodes, Limits.parsed(vars(args)))
