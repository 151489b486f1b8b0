"""Checksums of a checkpoint's files, written beside them on save and compared before a load.

iter_0000020/checksums.json: {"files": {"__0_0.distcp": {"algorithm": "xxh3_128", "size": 1234, "digest": "..."}}}

Sizes are in bytes. The digest is null if the run that saved the file has checkpoint.verify=false.
"""

import json
import os
from collections.abc import Buffer, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from megatron_txssm.errors import UserError

CHECKSUMS = "checksums.json"
# As fast as memory, and long enough that damage cannot keep the digest by chance. Does not protect against forgery.
ALGORITHM = "xxh3_128"
_BLOCK = 4 << 20
# `sample` checks all files up to this many bytes, and one in this many of the larger ones.
_SMALL, _ONE_IN = 1 << 20, 16


class DamagedCheckpoint(UserError):
    """Files of a checkpoint are missing or differ from what was saved."""


@dataclass(frozen=True)
class Checksum:
    """Checksum of one file; size in bytes."""

    size: int
    digest: str | None
    algorithm: str | None = ALGORITHM


class HashingFile:
    """A file opened for writing that hashes its bytes as they are written; torch writes sequentially."""

    def __init__(self, stream: BinaryIO, *, hashed: bool = True):
        self.stream, self.size, self._hash = stream, 0, xxhash.xxh3_128() if hashed else None

    def write(self, data: Buffer) -> int:
        if self._hash is not None:
            self._hash.update(data)
        written = self.stream.write(data)
        self.size += written
        return written

    def fileno(self) -> int:
        # Callers want to fsync: flush Python's buffer first.
        self.stream.flush()
        return self.stream.fileno()

    def checksum(self) -> Checksum:
        return Checksum(self.size, None, None) if self._hash is None else Checksum(self.size, self._hash.hexdigest())

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def checksum(path: Path, *, hashed: bool = True) -> Checksum:
    """Checksum of an existing file. With `hashed` False, only its size."""
    if not hashed:
        return Checksum(path.stat().st_size, None, None)
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb", buffering=0) as stream:
        buffer = bytearray(_BLOCK)
        while read := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:read])
            size += read
    return Checksum(size, digest.hexdigest())


def to_text(files: Mapping[str, Checksum]) -> str:
    return json.dumps({"files": {name: asdict(files[name]) for name in sorted(files)}}, indent=1) + "\n"


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """Name -> saved checksum; None for checkpoints without any (older or foreign). DamagedCheckpoint if unreadable."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    try:
        files = json.loads(path.read_bytes())["files"]
        return {name: Checksum(**entry) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is not readable ({type(error).__name__}: {error}); {_REMEDY}") from None


_REMEDY = "copy the checkpoint again, or take an older step"


def wrong_sizes(folder: Path) -> str:
    """The first file of a checkpoint that is missing or has the wrong size; empty if all are right."""
    try:
        files = read_checksums(folder)
    except DamagedCheckpoint as error:
        return str(error).removesuffix(f"; {_REMEDY}")
    for name, saved in sorted((files or {}).items()):
        if wrong := _wrong_size(folder / name, saved):
            return wrong
    return ""


def _wrong_size(file: Path, saved: Checksum) -> str:
    try:
        size = os.stat(file).st_size
    except FileNotFoundError:
        return f"{file} is missing"
    if size != saved.size:
        return f"{file} {'is cut short' if size < saved.size else 'is too long'}: {size:,} bytes of {saved.size:,}"
    return ""


def files_to_hash(files: Mapping[str, Checksum], verify: bool | str, turn: int = 0) -> list[str]:
    """The files whose digests `checkpoint.verify` checks; for `sample`, `turn` selects the large ones."""
    known = sorted(name for name, saved in files.items() if saved.algorithm == ALGORITHM and saved.digest)
    if verify != "sample":
        return known if verify else []
    small = [name for name in known if files[name].size <= _SMALL]
    large = [name for name in known if files[name].size > _SMALL]
    return small + large[turn % min(_ONE_IN, len(large) or 1) :: _ONE_IN]


def wrong_contents(folder: Path, names: Iterable[str], files: Mapping[str, Checksum]) -> str:
    """The first of the named files whose contents differ from what was saved; empty if all match."""
    for name in names:
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
        if found != files[name]:
            return f"{folder / name} is not what was saved ({ALGORITHM} {found.digest}, not {files[name].digest})"
    return ""


def verify_files(folder: Path, verify: bool | str, turn: int = 0) -> None:
    """All checks that `checkpoint.verify` selects, in one process; DamagedCheckpoint for the first damaged file."""
    files = read_checksums(folder)
    if verify is False or files is None:
        return
    wrong = wrong_sizes(folder) or wrong_contents(folder, files_to_hash(files, verify, turn), files)
    if wrong:
        raise DamagedCheckpoint(f"{wrong}; {_REMEDY}")
