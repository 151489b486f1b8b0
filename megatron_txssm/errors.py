"""What the command line prints without a traceback, and what such messages are made of."""

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: name, value, remedy. The command line prints it and exits with 2."""


class RequirementError(UserError, ImportError):
    """A library that is missing, or of a version that cannot work."""


def readable(text: str) -> str:
    """A message may hold what somebody typed or a file says: nothing that a terminal obeys, no word without an end."""
    text = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    return re.sub(r"\S{400,}", lambda word: f"{word[0][:200]}...{word[0][-50:]}", text)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def require_positive(**values: int | None) -> None:
    """UserError where one of these is below 1; each is named as its option is. None passes."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


def shown(value: Any) -> str:
    """A user's value for a message, shortened."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)
