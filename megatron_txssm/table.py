"""Tables, alike for every verb: nothing is cut, as one may have to type it.

What a terminal is too narrow for stands beneath its row, with the column's name, folded. In a file or a pipe a row is
one line, whatever its length.
"""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from megatron_txssm.errors import readable

_GAP, _INDENT = "  ", "    "


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], file: TextIO | None = None) -> None:
    """Print `rows` under the names of their `columns`; `>name` aligns a column to the right, as numbers need it."""
    for line in table_lines(columns, rows, terminal_width(file or sys.stdout)):
        print(line, file=file)


def terminal_width(file: TextIO) -> int | None:
    """Columns of the terminal that a stream goes to; None where it goes to a file or a pipe."""
    if not file.isatty():
        return None
    try:
        columns = os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    # $COLUMNS, or 80, where the terminal does not know.
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
            # By what it takes on the screen, where a Chinese character is as wide as two letters.
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
    """Indented lines of at most `width`; no line for no text."""
    return textwrap.wrap(
        text, max(width, 20), initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
    )


def _beside(widths: Sequence[int], width: int | None) -> int:
    """How many columns have room beside each other, at least one."""
    if width is None:
        return len(widths)
    totals = [sum(widths[:count]) + len(_GAP) * (count - 1) for count in range(1, len(widths) + 1)]
    return max(1, sum(total <= width for total in totals))
