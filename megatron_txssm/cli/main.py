"""txssm <verb>: finds the verb's module and runs it. A verb's module is imported only when that verb is asked for."""

import argparse
import difflib
import importlib
import io
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_txssm import __version__
from megatron_txssm.cli.parsing import VERBS, _help_width
from megatron_txssm.errors import UserError, readable

# Headings of the help, and the verbs beneath them.
GROUPS = {
    "train": ("demo", "recipes", "data", "pretrain", "check"),
    "on a Slurm cluster": ("submit", "jobs", "logs", "cancel", "why"),
    "use what was trained": ("evaluate", "generate", "convert", "serve"),
}

EXAMPLES = """\
examples:
  txssm demo
  txssm recipes
  txssm recipes transxssm_320m --megatron-args
  txssm data shard smollm_corpus --plan
  txssm pretrain demo_cpu --nproc 2 --set training.train_iters=20
  txssm generate runs/demo --prompt 'def main('

completion at the tab key, in bash and zsh:
  eval "$(register-python-argcomplete txssm)\""""


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The whole command line's parser; only `verb` gets its options, as only its module is imported."""
    parser = Parser(
        prog="txssm",
        usage="txssm [-h] [--version] <verb> ...",
        description=f"Pretraining of TransXSSM and its baselines on Megatron-Core.\n\n{_verbs_help()}",
        epilog=f"`txssm <verb> --help` has a verb's options and examples.\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"txssm {__version__}")
    # The description lists them in groups, which argparse does not have.
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
    """argparse's, which says of an unknown option which one may be meant, and does so under its own verb's usage."""

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for the user's mistakes, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare_output()
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


def _prepare_output() -> None:
    """What the terminal's alphabet lacks is written as \\u65e5 and fails no command; nor does a closed output."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(words: list[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:
        from megatron_txssm.cli.completion import complete

        complete()
    verb = words[0] if words and not words[0].startswith("-") else None
    if verb is not None and verb not in VERBS:
        matches = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {matches[0]!r}?" if matches else f"use one of {', '.join(VERBS)}"
        raise UserError(f"unknown verb {verb!r}; {hint}")
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; change to one that is there") from None
    parser = build_parser(verb)
    args = parser.parse_args(words)
    if args.verb is None or getattr(args, "command", "") is None:
        # Whoever types that wants help; a script whose variable is empty must not take it for success.
        getattr(args, "show_help", parser.print_help)()
        return 2
    # A shell leaves `--json=~/proof` as it is.
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, Path(os.path.expanduser(value)))
    code = importlib.import_module(VERBS[args.verb][0]).run(args)
    sys.stdout.flush()
    return code or 0
