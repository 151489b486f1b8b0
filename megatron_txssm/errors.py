"""Errors that the command line prints without a traceback, and helpers for their messages."""

import difflib
import re
import reprlib
import traceback
from collections.abc import Iterable
from pathlib import Path

# Of questions, texts in a batch, samples or tokens.
_MOST = 10**9


class UserError(Exception):
    """A mistake that the user can fix: name, value, remedy. The command line prints it and exits with 2."""


class RequirementError(UserError, ImportError):
    """A library is missing, or has an unsupported version."""


def readable(text: str) -> str:
    """Escape control characters and shorten overlong words: the text may come from a user or a file."""
    text = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return re.sub(r"\S{400,}", lambda word: f"{word[0][:200]}...{word[0][-50:]}", text)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or an empty string if no known name is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def require_positive(**values: int | None) -> None:
    """UserError where one of these is below 1; each is named as its option is. None passes."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


def require_count(least: int = 1, **values: int | None) -> None:
    """As `require_positive`, from `least` on; UserError also above what any machine works through."""
    for name, value in values.items():
        if value is not None and not least <= value <= _MOST:
            raise UserError(f"--{name.replace('_', '-')} {value} must be from {least} to {_MOST:,}")


def shown(value: object) -> str:
    """A user's value for a message, shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def described(error: Exception) -> str:
    """An error of other software in one line, with the place where it was raised: an assertion may say nothing else."""
    *_, last = traceback.extract_tb(error.__traceback__)
    place = "/".join(Path(last.filename).parts[-3:])
    said = f"{type(error).__name__}: {error}".strip().removesuffix(":").partition("\n")[0]
    return f"{said} ({place}:{last.lineno}: {last.line})"
