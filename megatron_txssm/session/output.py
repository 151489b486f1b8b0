"""Output of workers: a few lines on the terminal, everything else in a log file per rank."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


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
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(descriptors, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
