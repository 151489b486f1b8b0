"""What a person who looks on sees of work that takes its time; nothing where nobody does."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def progress_bar(what: str, total: int, *, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """A function to tell how many more of `total` are done; a bar, from the fifth second on."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), amount, TimeRemainingColumn())
    progress = Progress(*columns, disable=not sys.stdout.isatty())
    task, shown_from = progress.add_task("", total=total), time.monotonic() + 5

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
    from rich.console import Console

    console = Console(file=terminal)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
