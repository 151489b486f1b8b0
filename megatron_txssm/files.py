"""Files and folders that appear complete or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_txssm.errors import UserError

# What a JSON file may hold.
type Json = dict[str, Json] | list[Json] | str | int | float | bool | None
type JsonObject = dict[str, Json]


def check_absent(out: Path) -> None:
    """UserError if `out` exists."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; name another OUT, or remove it")


@contextmanager
def complete_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends, and is removed if it fails.

    UserError if `out` exists, its parent cannot be written, or the disk has less than `nbytes` left or fills up.
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
def alone_in(folder: Path, option: str) -> Iterator[None]:
    """UserError if the folder cannot be made, or another process is in this block for it; `option`: names another.

    Processes of this machine; whether it holds for other nodes, too, depends on the file system (`try_lock`).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; name another folder with {option}") from None
    try:
        if not try_lock(lock):
            raise UserError(f"another process writes into {folder}; wait for it, or name another with {option}")
        yield
    finally:
        os.close(lock)


def try_lock(fd: int) -> bool:
    """Lock an open file or folder until it is closed or the process ends; False if another process has locked it.

    A file system that does not lock it, such as NFS a folder, lets everybody in.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the block, as Ctrl-C does, so that it cleans up; exit code 128 + the signal's number.

    Signals that are ignored stay so (nohup). Outside Python's main thread, which alone may set handlers, all stay as
    they are. Also a decorator.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    previous = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def write_file_atomically(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it: the final name appears complete or not at all."""
    path = Path(path)
    # Two processes may write the same file, so each uses its own temporary name.
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            flush(stream)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove files that `write_file_atomically` left in a folder when its process on this machine was killed."""
    for path in folder.glob("*.partial"):
        found = re.search(rf"\.{re.escape(socket.gethostname())}\.(\d+)\.partial$", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            path.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def partial_path(path: Path) -> Path:
    """The temporary name of a file: the same for every attempt, so that a killed process's file is overwritten."""
    return path.with_name(path.name + ".partial")


def flush(stream: IO[bytes]) -> None:
    """Flush to the disk, so that a renamed file is not empty after a power failure."""
    stream.flush()
    os.fsync(stream.fileno())


def write_json(path: Path, data: object, indent: int | None = 1) -> None:
    """Write JSON atomically; the same data gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, (json.dumps(data, indent=indent, ensure_ascii=False) + "\n").encode())


def write_results(path: Path, data: object) -> None:
    """`write_json` for what a user waits for: UserError if the disk does not take it."""
    try:
        write_json(path, data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; make room, or use a folder in which you may write"
        ) from None


def append_json(path: Path, data: object) -> None:
    """Append one line of JSON to a file, in one write: several processes may append at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(data, ensure_ascii=False) + "\n").encode()
    with path.open("ab", buffering=0) as stream:
        if stream.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
