"""Tables: no cell is cut at any width, no line is wider than the terminal, and a pipe gets one line a row."""

import fcntl
import io
import os
import struct
import subprocess
import sys
import termios

import pytest

from megatron_txssm.home import HOME
from megatron_txssm.recipe.loader import recipe_names
from megatron_txssm.terminal import print_table, table_lines

COLUMNS = ("recipe", ">params", "layers", "about")
ROWS = [
    ("transxssm_320m", "320.8M", "3 x SSSSSSSA", "seven state-space layers to one of attention"),
    ("demo", "1.8M", "1 x SSSSSSSA", ""),
]


def test_a_wide_terminal_and_a_pipe_have_a_line_for_each_row() -> None:
    expected = [
        "recipe          params  layers        about",
        "transxssm_320m  320.8M  3 x SSSSSSSA  seven state-space layers to one of attention",
        "demo              1.8M  1 x SSSSSSSA",
    ]
    assert list(table_lines(COLUMNS, ROWS, None)) == expected
    assert list(table_lines(COLUMNS, ROWS, 82)) == expected


def test_what_has_no_room_beside_stands_beneath_with_its_name() -> None:
    assert list(table_lines(COLUMNS, ROWS, 30)) == [
        "recipe          params",
        "transxssm_320m  320.8M",
        "    layers: 3 x SSSSSSSA;",
        "    about: seven state-space",
        "    layers to one of attention",
        "demo              1.8M",
        "    layers: 1 x SSSSSSSA",
    ]


@pytest.mark.parametrize("width", range(20, 90))
def test_no_word_is_cut_and_no_line_too_wide(width: int) -> None:
    lines = list(table_lines(COLUMNS, ROWS, width))
    assert max(map(len, lines)) <= width
    words = " ".join(lines).replace(";", "").split()
    assert {word for row in ROWS for cell in row for word in cell.split()} <= set(words)


def test_the_first_column_stays_whole_in_a_terminal_narrower_than_it() -> None:
    assert list(table_lines(("recipe", "about"), [("transxssm_320m", "the paper's")], 10))[1] == "transxssm_320m"


def test_cells_hold_nothing_that_a_terminal_obeys() -> None:
    lines = list(table_lines(("a", "b"), [("x\ny", "\x1b[31mred")], None))
    assert lines == ["a    b", "x y  \\x1b[31mred"]


def test_wide_characters_keep_the_columns_straight() -> None:
    lines = list(table_lines(("name", "b"), [("日本", "1"), ("four", "2")], None))
    assert lines[1:] == ["日本  1", "four  2"]


def test_a_table_without_rows_is_its_head() -> None:
    file = io.StringIO()
    print_table(("a", ">b"), [], file)
    assert file.getvalue() == "a  b\n"


def in_terminal(columns: int, *words: str) -> str:
    """What a command prints to a terminal of so many columns."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "megatron_txssm.cli", *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        # Linux ends a terminal whose other side is closed by an error.
        while chunk := _read(ours):
            text += chunk
        os.close(ours)
    assert process.returncode == 0
    return text.decode().replace("\r\n", "\n")


def _read(file: int) -> bytes:
    try:
        return os.read(file, 65536)
    except OSError:
        return b""


@pytest.mark.parametrize("columns", [80, 120])
def test_recipes_in_a_terminal_show_every_name_whole(columns: int) -> None:
    text = in_terminal(columns, "recipes")
    assert set(recipe_names()) <= {line.split()[0] for line in text.splitlines()}
    # A path is never folded.
    assert max(len(line) for line in text.splitlines() if str(HOME) not in line) <= columns
    assert "Unified RoPE" in text


def test_fields_in_a_terminal_show_type_default_and_meaning() -> None:
    text = in_terminal(80, "recipes", "--fields")
    assert "model.rope_scaling                         none\n    type: none | linear; meaning: " in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_plan_in_a_terminal_fits_its_width() -> None:
    text = in_terminal(
        80,
        "plan",
        "transxssm_1.3b",
        "--dry-runs",
        "0",
        "--gpus",
        "512",
        "--set",
        "parallel.pipeline_model_parallel_size=4",
    )
    assert max(map(len, text.splitlines())) <= 80
    assert "\n    why not: " in text and "GPU-hours" in text
