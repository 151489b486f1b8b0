"""Token shards in Megatron's .bin/.idx format: writing, checking before Megatron opens them, and reading.

A shard is two files with one prefix: PREFIX.bin holds the concatenated tokens of all documents, PREFIX.idx the width of
a token and the beginning of each sequence and document. Here every document is one sequence and ends with the
end-of-document token.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError
from megatron_txssm.files import flush, partial_path, write_file_atomically

if TYPE_CHECKING:
    import numpy as np

# The .idx layout of megatron/core/datasets/indexed_dataset.py, `_IndexWriter`, little-endian: the magic, version
# (uint64), code of the token type (uint8), number of sequences S and of document boundaries D (uint64 each); then
# the lengths in tokens (int32[S]), the byte offsets (int64[S]), the boundaries (int64[D]) and, in a multimodal shard,
# the modes (int8[S]). Repeated here so that a check need not import Megatron, which takes 7 s; a test compares the two.
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER_BYTES = 34
TOKEN_TYPE_OF_CODE = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


@dataclass(frozen=True)
class ShardCounts:
    """The contents of a shard."""

    documents: int
    # Tokens in the .bin, end-of-document tokens included.
    tokens: int
    # Size of the .bin.
    bytes: int


def token_type(vocab_size: int) -> "type[np.number]":
    """Megatron's choice (DType.optimal_dtype): uint16 below a vocabulary of 65,500, int32 from there on."""
    import numpy as np

    return np.uint16 if vocab_size < 65_500 else np.int32


class ShardWriter:
    """Writes documents to temporary files; `publish` gives them their final names, `discard` removes them.

    Only one process may write a prefix at a time. Memory: 4 bytes per document.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, eod: int) -> None:
        import numpy as np

        if not 0 <= eod < vocab_size:
            raise ValueError(f"eod={eod} is not in the vocabulary of {vocab_size} tokens")
        self.bin_path, self.idx_path = _shard_paths(prefix)
        self.vocab_size, self.eod = vocab_size, eod
        self.documents = self.tokens = 0
        self.sha256: dict[str, str] = {}
        self._type = np.dtype(token_type(vocab_size))
        self._lengths: list[np.ndarray] = []
        self._hash = hashlib.sha256()
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = partial_path(self.bin_path).open("wb")

    @property
    def counts(self) -> ShardCounts:
        return ShardCounts(documents=self.documents, tokens=self.tokens, bytes=self.tokens * self._type.itemsize)

    def write(self, ids: "np.ndarray", lengths: "np.ndarray") -> None:
        """Append documents: their concatenated ids, without end-of-document tokens, and the number of ids of each."""
        import numpy as np

        if not len(lengths):
            return
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()} are outside the vocabulary of {self.vocab_size} tokens; were "
                "they encoded with another tokenizer?"
            )
        content = np.insert(ids.astype(self._type), np.cumsum(lengths), self.eod).tobytes()
        self._stream.write(content)
        self._hash.update(content)
        self._lengths.append((lengths + 1).astype(np.int32))
        self.documents += len(lengths)
        self.tokens += len(ids) + len(lengths)

    def publish(self) -> None:
        """Complete both files and give them their final names, the .bin first: an .idx always has its .bin."""
        try:
            flush(self._stream)
            self._stream.close()
            index = self._index()
            self.sha256 = {".bin": self._hash.hexdigest(), ".idx": hashlib.sha256(index).hexdigest()}
            # A shard of the same name must never be a mixture of old and new.
            self.idx_path.unlink(missing_ok=True)
            partial_path(self.bin_path).replace(self.bin_path)
            write_file_atomically(self.idx_path, index)
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove files without a final name."""
        # On a full disk, the buffer's last write fails as well.
        with contextlib.suppress(OSError):
            self._stream.close()
        partial_path(self.bin_path).unlink(missing_ok=True)

    def _index(self) -> bytes:
        import numpy as np

        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        ends = np.cumsum(lengths, dtype=np.int64)
        code = next(code for code, name in TOKEN_TYPE_OF_CODE.items() if name == self._type.name)
        boundaries = np.arange(self.documents + 1, dtype=np.int64)
        header = INDEX_MAGIC + struct.pack("<QBQQ", INDEX_VERSION, code, self.documents, self.documents + 1)
        offsets = (ends - lengths) * self._type.itemsize
        return header + lengths.tobytes() + offsets.tobytes() + boundaries.tobytes()


def write_shard(documents: Iterable[Sequence[int]], prefix: str | Path, vocab_size: int, eod: int) -> ShardCounts:
    """Write documents (token ids without the end-of-document token, `eod`, which is appended) as PREFIX.bin and .idx.

    Empty documents are left out.
    """
    import numpy as np

    writer = ShardWriter(prefix, vocab_size, eod)
    try:
        for ids in documents:
            if len(ids):
                # int64 first: a narrower type would wrap an id outside the vocabulary into a wrong token.
                writer.write(np.asarray(ids, dtype=np.int64), np.array([len(ids)]))
        if not writer.documents:
            raise UserError(f"{writer.bin_path}: there is no document to write; check the input of this shard")
        writer.publish()
    finally:
        writer.discard()
    return writer.counts


def check_shard(prefix: str | Path) -> ShardCounts:
    """Check that PREFIX.bin and PREFIX.idx exist and belong together; a UserError states fault and remedy.

    On the same faults, Megatron would raise a bare assertion or read wrong tokens. Reads the index, not the tokens.
    """
    import numpy as np

    bin_path, idx_path = _shard_paths(prefix)
    for path in (idx_path, bin_path):
        # Path.is_file would raise for a name that is too long.
        if not os.path.isfile(path):
            hint = "; give the prefix without .bin or .idx" if Path(prefix).suffix in (".bin", ".idx") else ""
            raise UserError(f"data prefix {prefix}: {path} does not exist; prepare the data or correct the path{hint}")
    remedy = "delete the .bin and .idx and prepare the data again"

    index_bytes = idx_path.stat().st_size
    with idx_path.open("rb") as stream:
        header = stream.read(INDEX_HEADER_BYTES)
    if not header.startswith(INDEX_MAGIC):
        found = header[: len(INDEX_MAGIC)]
        raise UserError(f"{idx_path}: not a Megatron index (it begins with {found!r}, not {INDEX_MAGIC!r}); {remedy}")
    if len(header) < INDEX_HEADER_BYTES:
        raise UserError(f"{idx_path}: cut off within its header ({index_bytes} bytes); {remedy}")
    version, type_code, sequences, boundaries = struct.unpack("<QBQQ", header[len(INDEX_MAGIC) :])
    if version != INDEX_VERSION:
        raise UserError(f"{idx_path}: index version {version}, Megatron reads version {INDEX_VERSION}; {remedy}")
    if type_code not in TOKEN_TYPE_OF_CODE:
        raise UserError(f"{idx_path}: token type code {type_code} is none of {sorted(TOKEN_TYPE_OF_CODE)}; {remedy}")
    expected_bytes = INDEX_HEADER_BYTES + sequences * (4 + 8) + boundaries * 8
    # The longer form has one mode byte per sequence.
    if index_bytes not in (expected_bytes, expected_bytes + sequences):
        raise UserError(
            f"{idx_path}: {index_bytes} bytes, but {sequences} sequences and {boundaries - 1} documents need "
            f"{expected_bytes}; the file is cut off or corrupt: {remedy}"
        )
    if not sequences or boundaries < 2:
        raise UserError(f"{idx_path}: the shard holds no document; check the input it was made from and {remedy}")

    index = np.memmap(idx_path, mode="r", dtype=np.uint8)
    lengths_end = INDEX_HEADER_BYTES + 4 * sequences
    offsets_end = lengths_end + 8 * sequences
    lengths = np.frombuffer(index, np.int32, sequences, INDEX_HEADER_BYTES)
    offsets = np.frombuffer(index, np.int64, sequences, lengths_end)
    documents = np.frombuffer(index, np.int64, boundaries, offsets_end)
    token_bytes = np.dtype(TOKEN_TYPE_OF_CODE[type_code]).itemsize
    ends = np.cumsum(lengths, dtype=np.int64) * token_bytes
    consistent = (
        lengths.min() >= 0
        and offsets[0] == 0
        and np.array_equal(offsets[1:], ends[:-1])
        and documents[0] == 0
        and documents[-1] == sequences
        and bool(np.all(np.diff(documents) >= 0))
    )
    if not consistent:
        raise UserError(f"{idx_path}: its lengths and offsets contradict one another; the file is corrupt: {remedy}")
    bin_bytes = bin_path.stat().st_size
    if bin_bytes != ends[-1]:
        raise UserError(
            f"{bin_path}: {bin_bytes} bytes, but {idx_path.name} describes {ends[-1]} "
            f"({ends[-1] // token_bytes} tokens of {token_bytes} bytes); the two do not belong together: {remedy}"
        )
    return ShardCounts(documents=boundaries - 1, tokens=int(ends[-1]) // token_bytes, bytes=bin_bytes)


def read_tokens(prefix: str | Path) -> "np.ndarray":
    """Check a shard and map its tokens as one read-only array [tokens], documents concatenated."""
    import numpy as np

    check_shard(prefix)
    bin_path, idx_path = _shard_paths(prefix)
    with idx_path.open("rb") as stream:
        type_code = stream.read(INDEX_HEADER_BYTES)[len(INDEX_MAGIC) + 8]
    return np.memmap(bin_path, mode="r", dtype=TOKEN_TYPE_OF_CODE[type_code])


def _shard_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The .bin and the .idx; a dot in the prefix is kept (Path.with_suffix would replace the text after it)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
