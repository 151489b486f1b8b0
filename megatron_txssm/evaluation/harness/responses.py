"""A model's responses, kept as they are made, so that an interrupted evaluation goes on where it was.

A file has one line per batch: {"key of a request": response, ...}. Numbers are written so that reading gives them back
bit for bit. A batch is asked again unless all of it is there, so every batch is always computed as a whole, and the
responses do not depend on interruptions.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError


class Responses:
    """The responses in a file, which is made at the first of them."""

    def __init__(self, file: Path):
        self.file, self._known = file, dict[str, Any]()
        try:
            content = file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; move it away") from None
        whole, _, torn = content.rpartition(b"\n")
        for line in whole.splitlines():
            self._known |= _responses(line, file)
        if torn:
            # A line that was being written when the process was killed.
            with file.open("r+b") as stream:
                stream.truncate(len(content) - len(torn))

    def __len__(self) -> int:
        return len(self._known)

    def of(self, requests: Sequence[Any]) -> list[Any] | None:
        """The responses to these requests; None unless all are known."""
        keys = [_key(request) for request in requests]
        return [self._known[key] for key in keys] if all(key in self._known for key in keys) else None

    def add(self, requests: Sequence[Any], responses: Sequence[Any]) -> None:
        """Keep a batch, in one write. UserError if that fails."""
        made = dict(zip(map(_key, requests), responses, strict=True))
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab", buffering=0) as stream:
                line = json.dumps(made).encode() + b"\n"
                if stream.write(line) != len(line):
                    raise OSError(None, "the disk is full")
        except OSError as error:
            raise UserError(
                f"{self.file} cannot be written ({error.strerror}); make room, and the same command goes on, or name "
                "another folder with --output"
            ) from error
        self._known |= made


def _responses(line: bytes, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        # Torn by a full disk or a crash: its requests are made again.
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged; remove it, and its requests are made again")
    return found


def _key(request: Any) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]
