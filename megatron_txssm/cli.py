"""txssm <verb>: finds the verb's module and runs it. A verb's module is imported only when that verb is asked for.

A module of `VERBS` has `add_parser(subparsers)`, which calls `add_verb` or `add_commands`, and `run(args) -> int |
None`, the exit code.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_txssm import __version__
from megatron_txssm.errors import UserError, readable

# Verb -> (module, one line of help).
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("megatron_txssm.demo", "train a small TransXSSM on this machine from real text, stop, resume, write text"),
    "recipes": ("megatron_txssm.recipe.show", "list the recipes, or show one with all its fields"),
    "data": ("megatron_txssm.data.commands", "make, check and inspect a corpus of token shards"),
    "pretrain": (
        "megatron_txssm.launch.local",
        "pretrain a recipe: on processes of this machine, or under torchrun or srun",
    ),
    "check": ("megatron_txssm.check.command", "prove that a recipe's parallel layouts compute what one process does"),
    "submit": ("megatron_txssm.launch.submit_command", "queue a recipe's pretraining on a Slurm cluster"),
    "jobs": ("megatron_txssm.launch.jobs_command", "list your Slurm jobs, and how far their runs are"),
    "logs": ("megatron_txssm.launch.logs_command", "show what a run's job prints, as it grows"),
    "cancel": ("megatron_txssm.launch.cancel_command", "cancel a run's jobs; the trainer saves first"),
    "why": ("megatron_txssm.launch.why_command", "say why a run's last attempt ended, and what to do"),
    "generate": ("megatron_txssm.evaluation.generate", "continue a prompt with a checkpoint or a Hugging Face model"),
    "convert": ("megatron_txssm.checkpoint.convert_command", "checkpoints to Hugging Face models and back, proven"),
    "serve": ("megatron_txssm.hf.serve_command", "answer OpenAI-style requests with a Hugging Face model"),
    "evaluate": ("megatron_txssm.evaluation.evaluate", "the loss of a run's checkpoint on all validation data"),
}

EXAMPLES = """\
examples:
  txssm demo
  txssm recipes
  txssm recipes transxssm_320m --megatron-args
  txssm data shard smollm_corpus --plan
  txssm pretrain demo_cpu --nproc 2 --set training.train_iters=20
  txssm generate runs/demo --prompt 'def main('"""


def add_verb(subparsers: "argparse._SubParsersAction", verb: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of one verb, with its help from `VERBS` and its examples at the end of --help."""
    _, summary = VERBS[verb]
    return subparsers.add_parser(verb, **_help(summary, examples))


def add_commands(
    subparsers: "argparse._SubParsersAction", verb: str, commands: Mapping[str, tuple[str, Sequence[str]]]
) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a verb's commands, by name; `commands`: name -> (one line of help, examples)."""
    parser = add_verb(subparsers, verb, [examples[0] for _, examples in commands.values()])
    action = parser.add_subparsers(title="commands", dest="command", metavar="<command>", required=True)
    return {name: action.add_parser(name, **_help(*about)) for name, about in commands.items()}


def _help(summary: str, examples: Sequence[str]) -> dict[str, Any]:
    return {
        "help": summary,
        "description": summary[0].upper() + summary[1:] + ".",
        "epilog": "\n  ".join(["examples:", *examples]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The whole command line's parser; only `verb` gets its options, as only its module is imported."""
    parser = argparse.ArgumentParser(
        prog="txssm",
        description="Pretraining of TransXSSM and its baselines on Megatron-Core.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"txssm {__version__}")
    subparsers = parser.add_subparsers(title="verbs", dest="verb", metavar="<verb>", required=True)
    for name, (module, summary) in VERBS.items():
        if name == verb:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for the user's mistakes, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except UserError as error:
        print(f"error: {readable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone (`txssm recipes | head`); closing stdout must not complain, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(words: list[str]) -> int:
    verb = words[0] if words and not words[0].startswith("-") else None
    if verb is not None and verb not in VERBS:
        matches = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {matches[0]!r}?" if matches else f"use one of {', '.join(VERBS)}"
        raise UserError(f"unknown verb {verb!r}; {hint}")
    args = build_parser(verb).parse_args(words)
    # A shell leaves `--json=~/proof` as it is.
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, Path(os.path.expanduser(value)))
    code = importlib.import_module(VERBS[args.verb][0]).run(args)
    sys.stdout.flush()
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
