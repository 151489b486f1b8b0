"""What a person who looks on sees of work that takes its time; nothing where nobody does."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def progress_bar(what: str, total: int, *, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A function to tell how many more of `total` are done; a bar, from the fifth second on."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    amount = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (_description(), BarColumn(), amount, TimeRemainingColumn())
    progress = Progress(*columns, disable=not sys.stdout.isatty())
    task, shown_from = progress.add_task(what, total=total), time.monotonic() + 5

    def advance(count: int) -> None:
        progress.advance(task, count)
        if time.monotonic() > shown_from:
            progress.start()

    try:
        yield advance
    finally:
        progress.stop()


@contextmanager
def doing(what: str, terminal: TextIO | None = None) -> Iterator[None]:
    """Say what takes its time, where a person looks on; on standard output, unless another `terminal` is named."""
    from rich.progress import Progress, SpinnerColumn

    where = {} if terminal is None else beside_the_log(terminal)
    hidden = not (terminal or sys.stdout).isatty()
    with Progress(SpinnerColumn(), _description(), **where, transient=True, disable=hidden) as progress:
        progress.add_task(what, total=None)
        yield


def beside_the_log(terminal: TextIO) -> dict[str, Any]:
    """For rich's Progress on `terminal` where standard output and error lead to a log: it leaves these alone.

    It would bring their lines to the terminal, and ask them for its width.
    """
    return {"console": terminal_console(terminal), "redirect_stdout": False, "redirect_stderr": False}


def terminal_console(terminal: TextIO) -> Any:
    """rich's console on a stream, as wide as that very stream."""
    from rich.console import Console, ConsoleDimensions

    class TerminalConsole(Console):
        @property
        def size(self) -> ConsoleDimensions:
            try:
                columns, rows = os.get_terminal_size(terminal.fileno())
            except (OSError, ValueError):
                return super().size
            # A terminal that does not know its size says 0.
            return ConsoleDimensions(columns, rows) if columns > 0 else super().size

    return TerminalConsole(file=terminal)


def _description() -> Any:
    """A column that says what is done; braces and brackets in it mean nothing."""
    from rich.progress import TextColumn

    return TextColumn("{task.description}", markup=False)
