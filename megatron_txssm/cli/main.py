"""txssm <verb>: imports the verb's module, and no other verb's, and runs it."""

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.cli.parsing import VERBS, build_parser
from megatron_txssm.errors import UserError, readable


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
        # The reader has exited (`txssm recipes | head`); closing stdout must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _prepare_output() -> None:
    """Write characters that stdout cannot encode as \\u65e5, and accept a closed stdout."""
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
        # Show the help, but fail: a script whose variable is empty must not succeed.
        getattr(args, "show_help", parser.print_help)()
        return 2
    # Shells do not expand `--json=~/proof`.
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, Path(os.path.expanduser(value)))
    code = importlib.import_module(VERBS[args.verb][0]).run(args)
    sys.stdout.flush()
    return code or 0
