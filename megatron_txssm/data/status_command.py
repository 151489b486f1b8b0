"""`txssm data status`, and how progress is shown."""

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_txssm.data.status import CorpusStatus, SubsetStatus

SECONDS_BETWEEN_REFRESHES = 0.5
FAILURES_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", help="a corpus directory, or the name of its recipe")
    parser.add_argument("--follow", "-f", action="store_true", help="until all tasks are finished")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.plan import corpus_directory

    directory = corpus_directory(args.corpus)
    status = CorpusStatus(directory)
    if args.follow:
        with progress_bars(status):
            while not all(subset.done for subset in status.read()):
                time.sleep(2)
    subsets = status.read()
    print_status(subsets)
    return 0


def print_status(subsets: list[SubsetStatus]) -> None:
    """A row per subset, then what is wrong."""
    table = Table(box=None, pad_edge=False)
    for column in ("subset", ">tasks", ">documents", ">tokens", ">text", ">broken", "now"):
        justify = "right" if column[0] == ">" else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=True)
    for s in subsets:
        now = {"running": s.running, "failed": len(s.failed), "lost": s.lost}
        table.add_row(
            s.name,
            f"{s.finished:,}/{s.tasks:,}",
            f"{s.documents:,}",
            f"{s.tokens:,}",
            f"{s.text_bytes / 1e6:,.1f} MB",
            f"{sum(s.broken.values()):,}",
            ", ".join(f"{number:,} {state}" for state, number in now.items() if number) or "-",
        )
    # In a file or a pipe there is no width to keep to.
    console = Console(markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for s in subsets:
        if s.broken:
            reasons = ", ".join(f"{number:,} × {reason}" for reason, number in s.broken.items())
            console.print(f"{s.name}: {reasons}; their places are in its tasks' manifests")
        for task, error in sorted(s.failed.items())[:FAILURES_SHOWN]:
            console.print(f"{s.name} task {task} failed: {error}")


def tasks_text(subsets: list[SubsetStatus]) -> str:
    return f"{sum(s.finished for s in subsets):,} of {sum(s.tasks for s in subsets):,} tasks"


@contextlib.contextmanager
def progress_bars(status: CorpusStatus) -> Iterator[None]:
    """A bar per subset while the work goes on, where stdout is a terminal."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns += [TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, transient=True) as progress:
        bars = {name: progress.add_task(name, total=1.0, detail="") for name in status.plan.tasks}
        stop = threading.Event()

        def refresh() -> None:
            while not stop.wait(SECONDS_BETWEEN_REFRESHES):
                for subset in status.read():
                    detail = f"{subset.finished}/{subset.tasks} tasks, {subset.tokens / 1e6:,.1f}M tokens"
                    progress.update(bars[subset.name], completed=subset.progress, detail=detail)

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
