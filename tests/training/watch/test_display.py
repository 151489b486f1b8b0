"""What a person sees: lines or a bar, whatever the width and the kind of the terminal, and the remaining time."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest

from megatron_txssm.terminal import doing
from megatron_txssm.training.watch import display
from megatron_txssm.training.watch.display import BarDisplay, PlainDisplay, describe, make_display

METRICS = {
    "iteration": 20,
    "lm loss": 4.123456,
    "tokens_per_second": 12345.6,
    "model_tflops_per_second_per_rank": 0.1234,
    "learning_rate": 3e-4,
}


def test_one_line() -> None:
    assert describe(METRICS) == "loss 4.1235 | 12,346 tokens/s | 0.123 TFLOP/s per rank | lr 3.0e-04"
    assert describe(METRICS | {"learning_rate": None}) == "loss 4.1235 | 12,346 tokens/s | 0.123 TFLOP/s per rank"


def test_mfu_where_the_peak_is_known() -> None:
    known = METRICS | {"mfu": 0.41749, "learning_rate": None, "not_in_bf16": False}
    line = "loss 4.1235 | 12,346 tokens/s | 0.123 TFLOP/s per rank | MFU 41.7%"
    assert describe(known) == line
    # FP8 has a higher peak, of which this would be less.
    assert describe(known | {"not_in_bf16": True}) == f"{line} of the bf16 peak"


def test_remaining_time_of_a_resumed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = StringIO(), SimpleNamespace(now=0.0)
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: clock.now))
    plain = PlainDisplay(terminal, train_iters=100)
    for iteration, now in ((61, 1000.0), (71, 1020.0), (81, 1060.0)):
        clock.now = now
        plain.step(METRICS | {"iteration": iteration})
    # 2 s a step after ten steps, 3 s after twenty; the 60 steps of the first run count for nothing.
    assert re.findall(r"ETA (\S+)", terminal.getvalue()) == ["-", "0:00:58", "0:00:57"]


def test_plain_lines_where_nobody_looks(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w+") as file:
        display = make_display(file, 100)
        assert isinstance(display, PlainDisplay)
        display.step(METRICS)
        display.close()
        file.seek(0)
        text = file.read()
    assert text.startswith("iteration 20/100 | loss 4.1235 | ")
    assert text.count("\n") == 1
    assert "\x1b" not in text and "\r" not in text


@contextmanager
def terminal_of(columns: int) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A terminal of this width, and a function that closes it and gives what it was sent."""
    ours, theirs = pty.openpty()
    set_width(theirs, columns)
    with os.fdopen(theirs, "w") as terminal:

        def sent() -> str:
            terminal.close()
            return read_all(ours)

        yield terminal, sent
    os.close(ours)


def set_width(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def read_all(terminal: int) -> str:
    """What a closed terminal was sent; one read may give only the first part."""
    pieces = []
    with contextlib.suppress(OSError):  # EIO: the other side is closed, and all is read
        while piece := os.read(terminal, 1 << 16):
            pieces.append(piece)
    return b"".join(pieces).decode()


def last_lines(sent: str) -> list[str]:
    """The lines of the last drawing, without colours and movements."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sent.rpartition("\x1b[2K")[2])
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.fixture
def xterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "LINES", "NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("xterm")
@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_a_bar_with_step_and_remaining_time_at_any_width(columns: int) -> None:
    with terminal_of(columns) as (terminal, sent):
        bar = make_display(terminal, 190_735)
        assert isinstance(bar, BarDisplay)
        bar.step(METRICS | {"iteration": 123_456})
        bar.close()
        line, figures = last_lines(sent())
    assert re.fullmatch(r"training \S+ 123456/190735 \S+", line) and len(line) == columns, line
    assert "━" * 15 in line
    assert describe(METRICS).startswith(figures.removesuffix("…")) and len(figures) == min(columns, 67)


@pytest.mark.usefixtures("xterm")
def test_it_follows_the_width_of_its_terminal() -> None:
    with terminal_of(120) as (terminal, sent):
        bar = make_display(terminal, 100)
        bar.step(METRICS)
        set_width(terminal.fileno(), 80)
        bar.step(METRICS)
        bar.close()
        assert len(last_lines(sent())[0]) == 80


@pytest.mark.usefixtures("xterm")
def test_notes_stand_above_the_bar_as_they_are() -> None:
    note = f"iteration 20 | validation-[bold] lm loss 3.2500 :smile: | {'x' * 80}"
    with terminal_of(80) as (terminal, sent):
        bar = make_display(terminal, 100)
        assert isinstance(bar, BarDisplay)
        bar.step(METRICS | {"iteration": 90})
        task = bar.progress.tasks[0]
        # Resumed at 90: the steps of the first run say nothing of the pace.
        assert (task.completed, task.total, task.speed) == (90, 100, None)
        bar.note(note)
        bar.close()
        assert note in sent()


@pytest.mark.usefixtures("xterm")
def test_megatrons_lines_stay_out_of_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with terminal_of(80) as (terminal, sent):
        bar = make_display(terminal, 100)
        print("Megatron's line")
        print("Megatron's warning", file=sys.stderr)
        bar.close()
        assert "Megatron" not in sent()
    assert capfd.readouterr() == ("Megatron's line\n", "Megatron's warning\n")


@pytest.mark.usefixtures("xterm")
@pytest.mark.parametrize(
    ("name", "value", "kind"), [("TERM", "dumb", PlainDisplay), ("NO_COLOR", "1", BarDisplay), ("TERM", "", BarDisplay)]
)
def test_what_the_terminal_can_do(monkeypatch: pytest.MonkeyPatch, name: str, value: str, kind: type) -> None:
    monkeypatch.setenv(name, value)
    with terminal_of(80) as (terminal, sent):
        shown = make_display(terminal, 100)
        shown.step(METRICS)
        shown.close()
        text = sent()
    assert isinstance(shown, kind)
    assert ("\x1b" in text) == (kind is BarDisplay)
    # Colours, not the movements of the cursor.
    assert not (name == "NO_COLOR" and re.search(r"\x1b\[[0-9;]*3[0-9;]*m", text))


@pytest.mark.usefixtures("xterm")
def test_work_that_takes_its_time_beside_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    with terminal_of(80) as (terminal, sent):
        with doing("loading {this} [bold]model", terminal):
            print("Megatron's line")
        text = sent()
    assert "loading {this} [bold]model" in text and "Megatron" not in text
    assert capfd.readouterr().out == "Megatron's line\n"
