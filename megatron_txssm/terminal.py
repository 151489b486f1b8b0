"""Tables and progress display, shared by all verbs.

Table cells are never truncated, because users may need to copy them: columns that do not fit a terminal are printed
below their row, wrapped, with the column's name. In a file or a pipe a row is one line of any length. Progress is only
shown on a terminal.
"""

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypedDict

from megatron_txssm.errors import readable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TextColumn

_GAP, _INDENT = "  ", "    "


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], file: TextIO | None = None) -> None:
    """Print `rows` under the names of their `columns`; `>name` aligns a column to the right, for numbers."""
    for line in table_lines(columns, rows, terminal_width(file or sys.stdout)):
        print(line, file=file)


def terminal_width(file: TextIO) -> int | None:
    """Columns of a stream's terminal; None for a file or a pipe."""
    if not file.isatty():
        return None
    try:
        columns = os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    # $COLUMNS or 80 if the terminal does not report its width.
    return columns or shutil.get_terminal_size().columns


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int | None) -> Iterator[str]:
    """The lines of a table, none wider than `width` unless its first column is."""
    from rich.cells import cell_len

    names = [name.lstrip(">") for name in columns]
    cells = [[" ".join(readable(cell).split()) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
    count = _beside(widths, width)

    def aligned(row: Sequence[str]) -> str:
        padded = []
        for cell, column, size in zip(row[:count], columns, widths, strict=False):
            # By width on the screen: a Chinese character is as wide as two letters.
            space = " " * (size - cell_len(cell))
            padded.append(space + cell if column.startswith(">") else cell + space)
        return _GAP.join(padded).rstrip()

    yield aligned(names)
    for row in cells:
        yield aligned(row)
        beneath = [f"{name}: {cell}" for name, cell in zip(names[count:], row[count:], strict=True) if cell]
        if width is not None:
            yield from folded("; ".join(beneath), width)


def folded(text: str, width: int) -> list[str]:
    """Indented lines of at most `width`; none for an empty text."""
    return textwrap.wrap(
        text, max(width, 20), initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
    )


def _beside(widths: Sequence[int], width: int | None) -> int:
    """How many columns fit side by side, at least one."""
    if width is None:
        return len(widths)
    totals = [sum(widths[:count]) + len(_GAP) * (count - 1) for count in range(1, len(widths) + 1)]
    return max(1, sum(total <= width for total in totals))


def compact(number: float, giga: str = "G") -> str:
    """Three digits and a decimal prefix: 3.21M; `giga`: for 10^9, "B" for parameters and tokens."""
    for prefix in ("", "k", "M", giga, "T"):
        if abs(number) < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}P"


@contextmanager
def progress_bar(what: str, total: int, *, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with each number of finished items of `total`; the bar appears after five seconds."""
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
    """Show a spinner with the name of a long operation, on standard output or another `terminal`."""
    from rich.progress import Progress, SpinnerColumn

    where: ProgressOptions = {} if terminal is None else beside_the_log(terminal)
    hidden = not (terminal or sys.stdout).isatty()
    with Progress(SpinnerColumn(), _description(), **where, transient=True, disable=hidden) as progress:
        progress.add_task(what, total=None)
        yield


class ProgressOptions(TypedDict, total=False):
    """Arguments of rich's Progress."""

    console: "Console"
    redirect_stdout: bool
    redirect_stderr: bool


def beside_the_log(terminal: TextIO) -> ProgressOptions:
    """Options for rich's Progress on `terminal` while standard output and error go to a log.

    By default rich would redirect their lines to the terminal, and take the width from them.
    """
    return {"console": terminal_console(terminal), "redirect_stdout": False, "redirect_stderr": False}


def terminal_console(terminal: TextIO) -> "Console":
    """rich's console on a stream, with that stream's width."""
    from rich.console import Console, ConsoleDimensions

    class TerminalConsole(Console):
        @property
        def size(self) -> ConsoleDimensions:
            try:
                columns, rows = os.get_terminal_size(terminal.fileno())
            except (OSError, ValueError):
                return super().size
            # A terminal of unknown size reports 0.
            return ConsoleDimensions(columns, rows) if columns > 0 else super().size

    return TerminalConsole(file=terminal)


def _description() -> "TextColumn":
    """A column with the description, in which braces and brackets are literal."""
    from rich.progress import TextColumn

    return TextColumn("{task.description}", markup=False)
