"""Shows the progress of a corpus: as a table, and as bars while it is made."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from megatron_txssm.data.corpus.manifest import corpus_directory
from megatron_txssm.data.corpus.status import CorpusStatus, SubsetStatus

SECONDS_BETWEEN_REFRESHES = 0.5
# In a process other than the one that makes the corpus.
SECONDS_BETWEEN_LOOKS = 2.0
FAILURES_SHOWN = 10


def show_status(corpus: str | Path, *, follow: bool = False) -> int:
    """Print the progress of a corpus, wherever its tasks run; returns the exit code.

    corpus: a directory, or the name of its recipe. follow: show bars until each subset is finished or has a failed
    task, then print.
    """
    status = CorpusStatus(corpus_directory(corpus))
    if follow:
        with progress(status):
            while any(not subset.done and not subset.failed for subset in status.read()):
                time.sleep(SECONDS_BETWEEN_LOOKS)
    print_status(status.read())
    return 0


def print_status(subsets: list[SubsetStatus]) -> None:
    """Print a row per subset, then the problems."""
    # A file or a pipe does not limit the width.
    console = Console(markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    table = _table(subsets)
    if console.measure(table, options=console.options.update(width=10_000)).maximum > console.width:
        table = _table(subsets, short=True)
    console.print(table)
    for encoder in sorted(set().union(*(s.encoders for s in subsets))):
        console.print(f"tokenizer: {encoder}")
    for s in subsets:
        if s.broken:
            reasons = ", ".join(f"{number:,} × {reason}" for reason, number in s.broken.items())
            console.print(f"{s.name}: {reasons}; their places are in its tasks' manifests")
        if s.filtered:
            console.print(f"{s.name}: {s.filtered:,} of {s.rows:,} rows excluded by its filters")
        if s.done and s.documents and not s.held_out:
            console.print(f"{s.name}: none of its documents is held out for validation")
        if s.referred:
            console.print(
                f"{s.name}: {s.referred:,} documents with rare characters, encoded by the reference tokenizer"
            )
        for task, found in s.differences[:FAILURES_SHOWN]:
            since = f"texts with {', '.join(found['characters'])}" if found["characters"] else "every text"
            console.print(
                f"{s.name} task {task}: {found['document']}: {found['detail']}; the reference's were used, and {since} "
                "encoded by it from then on. Please report the text"
            )
        for task, error in sorted(s.failed.items())[:FAILURES_SHOWN]:
            console.print(f"{s.name} task {task} failed: {error}")


def _table(subsets: list[SubsetStatus], short: bool = False) -> Table:
    """The table; short: 12,345,678 as 12.3M."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if short else (0, 1))
    for column in ("subset", ">tasks", ">documents", ">tokens", ">text", ">broken"):
        justify = "right" if column[0] == ">" else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=True)
    table.add_column("now")

    def text_of(number: int) -> str:
        for size, unit in ((10**9, "B"), (10**6, "M")):
            if short and number >= size:
                return f"{number / size:,.1f}{unit}"
        return f"{number:,}"

    for s in subsets:
        now = {"running": s.running, "failed": len(s.failed), "lost": s.lost}
        table.add_row(
            s.name,
            f"{s.finished:,}/{s.tasks:,}",
            text_of(s.documents),
            text_of(s.tokens),
            f"{s.text_bytes / 1e9:,.1f} GB" if short and s.text_bytes >= 10**9 else f"{s.text_bytes / 1e6:,.1f} MB",
            text_of(sum(s.broken.values())),
            ", ".join(f"{number:,} {state}" for state, number in now.items() if number) or "-",
        )
    return table


def tasks_text(subsets: list[SubsetStatus]) -> str:
    return f"{sum(s.finished for s in subsets):,} of {sum(s.tasks for s in subsets):,} tasks"


@contextlib.contextmanager
def progress(status: CorpusStatus) -> Iterator[None]:
    """During the work, show a bar per subset if stdout is a terminal; in any case, report a slow encoder."""
    with contextlib.ExitStack() as stack:
        bars = stack.enter_context(_Bars(status)) if _is_terminal() else None
        slow: set[str] = set()
        stop = threading.Event()

        def refresh() -> None:
            while not stop.wait(SECONDS_BETWEEN_REFRESHES):
                for subset in status.read():
                    if bars:
                        bars.show(subset)
                    for encoder in {name for name in subset.encoders if "gigatoken" in name.partition("(")[2]} - slow:
                        print(f"{subset.name}: using the slower encoder, {encoder}", flush=True)
                        slow.add(encoder)

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class _Bars:
    def __init__(self, status: CorpusStatus) -> None:
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
        columns += [TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), TimeRemainingColumn()]
        self.progress = Progress(*columns, transient=True)
        self.bars = {name: self.progress.add_task(name, total=1.0, detail="") for name in status.plan.tasks}

    def __enter__(self) -> "_Bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, subset: SubsetStatus) -> None:
        detail = f"{subset.finished}/{subset.tasks} tasks, {subset.tokens / 1e6:,.1f}M tokens"
        self.progress.update(self.bars[subset.name], completed=subset.progress, detail=detail)
