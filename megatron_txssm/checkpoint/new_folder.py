"""A folder that appears complete or not at all, and a bar for what takes its time."""

import errno
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_txssm.errors import UserError


def check_absent(out: Path) -> None:
    """UserError where `out` exists."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; name another OUT, or remove it")


@contextmanager
def complete_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` where the block ends, and is removed where it fails.

    UserError where `out` exists, its parent cannot be written, or the disk has less than `nbytes` left or fills up.
    """
    check_absent(out)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}; name another OUT") from None
    try:
        if shutil.disk_usage(partial).free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield partial
        partial.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out} cannot be made: {error}") from None
        raise UserError(
            f"{out} cannot be written: {error.strerror}; it takes {nbytes:,} bytes: make room, or name another OUT"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def progress_bar(what: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A function to tell of bytes that are done; a bar, where a person looks on, from the fifth second on."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(), disable=not sys.stdout.isatty()
    )
    task, shown_from = progress.add_task("", total=nbytes), time.monotonic() + 5

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
