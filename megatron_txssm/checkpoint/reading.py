"""Marks of readers: a checkpoint that a process reads is not removed meanwhile (retention.py).

iter_0000020/reading_<token>.json names a process that reads this checkpoint, on any node (holders.py). It lies inside,
so that it moves with the folder: whoever puts the folder aside then sees a reader that came a moment before.
"""

import contextlib
import os
import tempfile
import threading
import weakref
from pathlib import Path

from megatron_txssm.holders import BEAT_SECONDS, Holder, living_holder, write_holder

_PREFIX = "reading_"


class Reading:
    """Marks a checkpoint's folder as being read, until `end`, or as long as this object or the process lives.

    Does nothing in a folder that is not there, or that this process may not write to.
    """

    def __init__(self, folder: Path):
        me, ended = Holder.myself(), threading.Event()
        file = folder / f"{_PREFIX}{me.token}.json"
        self.end = weakref.finalize(self, _end, file, ended)
        try:
            write_holder(file, me)
        except OSError:
            return
        threading.Thread(target=_beat, args=(file, ended), daemon=True, name="reading").start()

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _end(file: Path, ended: threading.Event) -> None:
    ended.set()
    with contextlib.suppress(OSError):
        file.unlink()


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(file)


def living_reader(folder: Path) -> Holder | str | None:
    """A process that reads a checkpoint; None if there is none. May wait a minute for a sign of life."""
    me = Holder.myself()
    marks = [name for name in _names(folder) if name.startswith(_PREFIX)]
    return next((reader for name in marks if (reader := living_holder(folder, me, name)) is not None), None)


def _names(folder: Path) -> list[str]:
    # A network file system shows the folder's present content to whom has just written there.
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder):
        pass
    return os.listdir(folder)
