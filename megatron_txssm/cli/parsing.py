"""The verbs of `txssm`, and what their modules share to parse their options.

A module of `VERBS` has `add_parser(subparsers)`, which calls `add_verb` or `add_commands`, and `run(args) -> int |
None`, the exit code. Only here and in the other modules of `cli/` are options known; what a verb does is a function
elsewhere, with plain arguments.
"""

import argparse
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

# Verb -> (module, one line of help).
VERBS: dict[str, tuple[str, str]] = {
    "demo": (
        "megatron_txssm.cli.demo",
        "train a small TransXSSM on this machine from real text, stop, resume, write text",
    ),
    "recipes": ("megatron_txssm.cli.recipes", "list the recipes, or show one with all its fields"),
    "data": ("megatron_txssm.cli.data", "make, check and inspect a corpus of token shards"),
    "pretrain": (
        "megatron_txssm.cli.pretrain",
        "pretrain a recipe: on processes of this machine, or under torchrun or srun",
    ),
    "check": ("megatron_txssm.cli.check", "prove that a recipe's parallel layouts compute what one process does"),
    "submit": ("megatron_txssm.cli.submit", "queue a recipe's pretraining on a Slurm cluster"),
    "jobs": ("megatron_txssm.cli.jobs", "list your Slurm jobs, and how far their runs are"),
    "logs": ("megatron_txssm.cli.logs", "show what a run's job prints, as it grows"),
    "cancel": ("megatron_txssm.cli.cancel", "cancel a run's jobs; the trainer saves first"),
    "why": ("megatron_txssm.cli.why", "say why a run's last attempt ended, and what to do"),
    "generate": ("megatron_txssm.cli.generate", "continue a prompt with a checkpoint or a Hugging Face model"),
    "convert": ("megatron_txssm.cli.convert", "checkpoints to Hugging Face models and back, proven"),
    "evaluate": ("megatron_txssm.cli.evaluate", "the loss of a run's checkpoint on all validation data"),
    "serve": ("megatron_txssm.cli.serve", "answer OpenAI-style requests with a Hugging Face model"),
}


def add_verb(subparsers: "argparse._SubParsersAction", verb: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of one verb, with its help from `VERBS` and its examples at the end of --help."""
    _, summary = VERBS[verb]
    return subparsers.add_parser(verb, **_help(summary, examples))


def add_commands(
    subparsers: "argparse._SubParsersAction", verb: str, commands: Mapping[str, tuple[str, Sequence[str]]]
) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a verb's commands, by name; `commands`: name -> (one line of help, examples)."""
    parser = add_verb(subparsers, verb, [examples[0] for _, examples in commands.values()])
    parser.set_defaults(show_help=parser.print_help)
    action = parser.add_subparsers(title="commands", dest="command", metavar="<command>")
    return {name: action.add_parser(name, **_help(*about)) for name, about in commands.items()}


def _help(summary: str, examples: Sequence[str]) -> dict[str, Any]:
    return {
        "help": summary,
        "description": textwrap.fill(f"{summary[0].upper()}{summary[1:]}.", _help_width()),
        "epilog": "\n  ".join(["examples:", *examples]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _help_width() -> int:
    """Where argparse itself folds."""
    return shutil.get_terminal_size().columns - 2


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """--set a.b=c, the way to change a recipe's fields, as `args.overrides`."""
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="change a field")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options of every verb that starts a run."""
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes to start (default: as few as the layout needs)"
    )
    parser.add_argument("--port", type=int, help="TCP port of the processes' rendezvous (default: any free one)")
    add_set_option(parser)
