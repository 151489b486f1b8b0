"""Output of workers: a few lines on the terminal, everything else in a log file per rank."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, TypeGuard

from megatron_txssm.errors import UserError, readable


def redirect_output(log_file: Path) -> TextIO:
    """Send this process's stdout and stderr, including C++ libraries', to `log_file`; returns the terminal.

    Megatron prints hundreds of lines before the first step, on every rank.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
    with open(log_file, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # Files are block-buffered, but a log should have the last line before a crash.
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    return terminal


@contextmanager
def output_redirected(log_file: Path) -> Iterator[TextIO]:
    """`redirect_output` for the duration of a `with`."""
    descriptors = os.dup(1), os.dup(2)
    with redirect_output(log_file) as terminal:
        try:
            yield terminal
        finally:
            # A full disk does not take the rest of the log.
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            for number, descriptor in enumerate(descriptors, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def run_redirected(log_file: Path, work: Callable[[TextIO], object]) -> int:
    """Do `work` with the terminal, and all other output in `log_file`; returns the exit code.

    An error that is no user's goes to the log, and is named on stderr. UserError if the disk is full.
    """
    failure: Exception | None = None
    with output_redirected(log_file) as terminal:
        try:
            work(terminal)
        except (UserError, BrokenPipeError):
            raise
        except Exception as error:
            failure = error
            # A full disk takes no log.
            if not _is_full(error):
                traceback.print_exc()
    if failure is None:
        return 0
    if _is_full(failure):
        raise UserError(f"{log_file.parent} cannot be written: {failure.strerror}; make room, and repeat the command")
    print(readable(f"error: {type(failure).__name__}: {failure}\nIts log: {log_file}"), file=sys.stderr)
    return 1


def _is_full(error: Exception) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
