"""Checksums of a checkpoint's files: written beside them with the save, compared before they are loaded.

iter_0000020/checksums.json: {"files": {"__0_0.distcp": {"algorithm": "xxh3_128", "size": 1234, "digest": "..."}}}
Sizes in bytes; the digest is null where the run that saved it has checkpoint.verify=false.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from megatron_txssm.errors import UserError

CHECKSUMS = "checksums.json"
# As fast as memory; 128 bits, so that no damage keeps the digest by chance. It is no guard against a forger.
ALGORITHM = "xxh3_128"
_BLOCK = 4 << 20
# Of `sample`: files up to this many bytes, and one in so many of the larger ones.
_SMALL, _ONE_IN = 1 << 20, 16


class DamagedCheckpoint(UserError):
    """Files of a checkpoint are missing, or are not what was saved."""


@dataclass(frozen=True)
class Checksum:
    """Of one file; size in bytes."""

    size: int
    digest: str | None
    algorithm: str | None = ALGORITHM


class HashingFile:
    """A file opened for writing, whose bytes are hashed on their way; torch writes from front to back."""

    def __init__(self, stream: BinaryIO, *, hashed: bool = True):
        self.stream, self.size, self._hash = stream, 0, xxhash.xxh3_128() if hashed else None

    def write(self, data: Any) -> int:
        if self._hash is not None:
            self._hash.update(data)
        written = self.stream.write(data)
        self.size += written
        return written

    def fileno(self) -> int:
        # Whoever asks wants to fsync: what Python still holds would not be on the disk.
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
    """Of a file that is there. `hashed` False: its size alone."""
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
    """Name -> what was saved; None where nothing is known (an older version's, a foreign one). DamagedCheckpoint."""
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
    """The first file of a checkpoint that is missing or not as long as it was saved; empty where all are."""
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
    """Those whose digests `checkpoint.verify` asks for; of a `sample` with another `turn`, other large ones."""
    known = sorted(name for name, saved in files.items() if saved.algorithm == ALGORITHM and saved.digest)
    if verify != "sample":
        return known if verify else []
    small = [name for name in known if files[name].size <= _SMALL]
    large = [name for name in known if files[name].size > _SMALL]
    return small + large[turn % min(_ONE_IN, len(large) or 1) :: _ONE_IN]


def wrong_contents(folder: Path, names: Iterable[str], files: Mapping[str, Checksum]) -> str:
    """The first of some files whose bytes are not those that were saved; empty where all are."""
    for name in names:
        try:
            found = checksum(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
        if found != files[name]:
            return f"{folder / name} is not what was saved ({ALGORITHM} {found.digest}, not {files[name].digest})"
    return ""


def verify_files(folder: Path, verify: bool | str, turn: int = 0) -> None:
    """In one process, all that `checkpoint.verify` asks for; DamagedCheckpoint for the first file that is damaged."""
    files = read_checksums(folder)
    if verify is False or files is None:
        return
    wrong = wrong_sizes(folder) or wrong_contents(folder, files_to_hash(files, verify, turn), files)
    if wrong:
        raise DamagedCheckpoint(f"{wrong}; {_REMEDY}")
