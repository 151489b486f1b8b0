"""The verbs of `txssm`, and the option parsing that their modules share.

A module of `VERBS` has `add_parser(subparsers)`, which calls `add_verb` or `add_commands`, and `run(args) -> int |
None`, which returns the exit code. Only `cli/` knows the options; a verb's work is done by a function elsewhere, which
takes plain arguments.
"""

import argparse
import difflib
import importlib
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypedDict

from megatron_txssm import __version__
from megatron_txssm.errors import UserError, readable

type Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# Verb -> (module, one line of help).
VERBS: dict[str, tuple[str, str]] = {
    "demo": (
        "megatron_txssm.cli.demo",
        "train a small TransXSSM on this machine: prepare real text, train, stop, resume, generate",
    ),
    "recipes": ("megatron_txssm.cli.recipes", "list the recipes, or show one with all its fields"),
    "plan": (
        "megatron_txssm.cli.plan",
        "find the fastest parallel layout for N GPUs: memory, traffic, days, GPU-hours",
    ),
    "data": ("megatron_txssm.cli.data", "make, check and inspect a corpus of token shards"),
    "pretrain": (
        "megatron_txssm.cli.pretrain",
        "pretrain a recipe, on this machine or under torchrun or srun",
    ),
    "check": ("megatron_txssm.cli.check", "verify that a recipe's parallel layouts compute the same as one process"),
    "runs": ("megatron_txssm.cli.runs", "list runs: state, step, loss, throughput, time left, size on disk"),
    "plot": ("megatron_txssm.cli.plot", "draw the curves of one or several runs"),
    "study": (
        "megatron_txssm.cli.study",
        "train several models alike, with several seeds, and compare them: tables of the paper",
    ),
    "bench": ("megatron_txssm.cli.bench", "compare the speed and memory of the paper's four models: its figure 4"),
    "submit": ("megatron_txssm.cli.submit", "queue a recipe's pretraining on a Slurm cluster"),
    "jobs": ("megatron_txssm.cli.jobs", "list your Slurm jobs and the progress of their runs (all runs: txssm runs)"),
    "logs": ("megatron_txssm.cli.logs", "show a run's output, or follow it"),
    "cancel": ("megatron_txssm.cli.cancel", "cancel a run's jobs; the trainer saves first"),
    "why": ("megatron_txssm.cli.why", "explain why a run's last attempt ended and what to do"),
    "report": (
        "megatron_txssm.cli.report",
        "write one HTML page on some runs: curves, goodput, recipe differences, data",
    ),
    "generate": ("megatron_txssm.cli.generate", "continue a prompt with a checkpoint or a Hugging Face model"),
    "convert": ("megatron_txssm.cli.convert", "convert checkpoints to Hugging Face models and back, with proof"),
    "eval": ("megatron_txssm.cli.eval", "measure a trained model: validation loss, benchmarks"),
    "evaluate": ("megatron_txssm.cli.evaluate", "the former name of `txssm eval loss`"),
    "merge": ("megatron_txssm.cli.merge", "average checkpoints of a run into a model of its own"),
    "serve": ("megatron_txssm.cli.serve", "answer OpenAI-style requests with a Hugging Face model"),
}


def add_verb(subparsers: Subparsers, verb: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of one verb, with its help from `VERBS` and its examples at the end of --help."""
    _, summary = VERBS[verb]
    return subparsers.add_parser(verb, **_help(summary, examples))


def add_commands(
    subparsers: Subparsers, verb: str, commands: Mapping[str, tuple[str, Sequence[str]]]
) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a verb's commands, by name; `commands`: name -> (one line of help, examples)."""
    parser = add_verb(subparsers, verb, [examples[0] for _, examples in commands.values()])
    parser.set_defaults(show_help=parser.print_help)
    action = parser.add_subparsers(title="commands", dest="command", metavar="<command>")
    return {name: action.add_parser(name, **_help(*about)) for name, about in commands.items()}


class _Help(TypedDict):
    help: str
    description: str
    epilog: str
    formatter_class: type[argparse.HelpFormatter]


def _help(summary: str, examples: Sequence[str]) -> _Help:
    return {
        "help": summary,
        "description": textwrap.fill(f"{summary[0].upper()}{summary[1:]}.", _help_width()),
        "epilog": "\n  ".join(["examples:", *examples]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _help_width() -> int:
    """The width at which argparse itself wraps."""
    return shutil.get_terminal_size().columns - 2


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """Add --set a.b=c, which changes a recipe's fields, as `args.overrides`."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="change a field of the recipe"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every verb that starts a run."""
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes to start (default: as few as the layout needs)"
    )
    parser.add_argument("--port", type=int, help="TCP port of the processes' rendezvous (default: any free one)")
    add_set_option(parser)


def add_tasks_option(parser: argparse.ArgumentParser, default: Sequence[str] | None, described: str) -> None:
    """Add --tasks, as a list of words; `described`: its default, for the help."""
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=default,
        metavar="TASK",
        help=f"suites (paper, ruler), tasks, groups and tags of lm_eval, or YAML files of tasks (default: {described})",
    )


# Options of a Slurm job that have one value.
ALLOCATION = ("nodes", "gpus_per_node", "nproc_per_node", "time", "partition", "account")


def add_allocation_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the options of a Slurm job; `required`: whether --nodes must be stated."""
    parser.add_argument("--nodes", type=int, required=required, metavar="N", help="number of nodes")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="GPUs per node, one process each (default: $TXSSM_GPUS_PER_NODE)"
    )
    parser.add_argument("--nproc-per-node", type=int, metavar="P", help="processes per node, for nodes without GPUs")
    parser.add_argument(
        "--time", metavar="LIMIT", help="time limit, such as 24:00:00; a training requeues itself and continues"
    )
    parser.add_argument("--partition", metavar="NAME", help="partition (default: $SBATCH_PARTITION, or the cluster's)")
    parser.add_argument("--account", metavar="NAME", help="account (default: $SBATCH_ACCOUNT, or the user's)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other sbatch option: exclusive, mem=0, …"
    )


def check_submit_options(args: argparse.Namespace) -> None:
    """UserError if a verb with --submit lacks its --nodes, or has options of a job without it: it would start here."""
    if args.submit:
        if args.nodes is None:
            raise UserError("--submit needs --nodes N")
        return
    for name in (*ALLOCATION, "sbatch", "dry_run"):
        if getattr(args, name) not in (None, [], False):
            raise UserError(f"--{name.replace('_', '-')} is for a Slurm job; add --submit, or leave it out")


# Headings of the help, and the verbs beneath them.
GROUPS = {
    "train": ("demo", "recipes", "plan", "data", "pretrain", "study", "bench", "check"),
    "look at runs": ("runs", "plot", "report", "logs", "why"),
    "on a Slurm cluster": ("submit", "jobs", "cancel"),
    "use what was trained": ("eval", "evaluate", "merge", "generate", "convert", "serve"),
}


EXAMPLES = """\
examples:
  txssm demo
  txssm recipes
  txssm recipes transxssm_320m --megatron-args
  txssm data shard smollm_corpus --plan
  txssm pretrain demo_cpu --nproc 2 --set training.train_iters=20
  txssm generate runs/demo --prompt 'def main('

tab completion in bash and zsh:
  eval "$(register-python-argcomplete txssm)\""""


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line; only `verb` gets its options, since only its module is imported."""
    parser = Parser(
        prog="txssm",
        usage="txssm [-h] [--version] <verb> ...",
        description=f"Pretraining of TransXSSM and its baselines on Megatron-Core.\n\n{_verbs_help()}",
        epilog=f"`txssm <verb> --help` shows a verb's options and examples.\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"txssm {__version__}")
    # The description lists the verbs in groups, which argparse does not support.
    subparsers = parser.add_subparsers(prog="txssm", dest="verb", metavar="<verb>", help=argparse.SUPPRESS)
    for name, (module, _) in VERBS.items():
        if name == verb:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name)
    return parser


def _verbs_help() -> str:
    fold = textwrap.TextWrapper(_help_width(), subsequent_indent=" " * 13)
    groups = []
    for heading, verbs in GROUPS.items():
        lines = [fold.fill(f"  {verb:10} {VERBS[verb][1]}") for verb in verbs]
        groups.append("\n".join([f"{heading}:", *lines]))
    return "\n\n".join(groups)


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests an option for an unknown one, below the usage of its own verb."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = list(args or ())
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        known = self._option_string_actions
        names = [word.partition("=")[0] for word in self._words]
        unknown = [name for name in names if name.startswith("--") and not any(o.startswith(name) for o in known)]
        matches = [(name, difflib.get_close_matches(name, known, n=1)) for name in unknown if len(name) > 2]
        hints = [f"{name}: did you mean {near[0]}?" for name, near in matches if near]
        super().error(readable("; ".join([message, *hints])))
