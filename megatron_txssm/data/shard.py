"""Token shards in Megatron's .bin/.idx format: write one, check one before Megatron opens it, read its tokens.

A shard is two files with one prefix: PREFIX.bin holds the tokens of all documents one after another, PREFIX.idx says
how wide a token is and where each sequence and document begins. Here every document is one sequence and ends with the
end-of-document token.
"""

import os
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

# The .idx layout of megatron/core/datasets/indexed_dataset.py, `_IndexWriter`, little-endian: the magic, version
# (uint64), code of the token type (uint8), number of sequences S and of document boundaries D (uint64 each); then
# the lengths in tokens (int32[S]), the byte offsets (int64[S]), the boundaries (int64[D]) and, in a multimodal shard,
# the modes (int8[S]). Kept here so that a check does not cost the 7 s of importing Megatron; a test compares the two.
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER_BYTES = 34
TOKEN_TYPE_OF_CODE = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

SECONDS_BEFORE_PROGRESS_BAR = 1.0


@dataclass(frozen=True)
class ShardCounts:
    """What a shard holds."""

    documents: int
    # Tokens in the .bin, end-of-document tokens included.
    tokens: int
    # Size of the .bin.
    bytes: int


def write_file_atomically(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it: the final name appears complete or not at all."""
    path = Path(path)
    partial = _partial_path(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_shard(
    documents: Iterable[Sequence[int]],
    prefix: str | Path,
    vocab_size: int,
    eod: int,
    *,
    total_documents: int | None = None,
) -> ShardCounts:
    """Write documents (their token ids, without the end) as PREFIX.bin and PREFIX.idx, each ended by `eod`.

    The token type is Megatron's choice: uint16 below a vocabulary of 65,500, int32 from there on. Both files are
    written under temporary names and renamed when complete, the .bin first, so an interrupted run leaves no .idx that
    belongs to nothing. Empty documents are left out. One process writes a prefix at a time.
    `total_documents` gives the progress bar its end.
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    if not 0 <= eod < vocab_size:
        raise ValueError(f"eod={eod} is not in the vocabulary of {vocab_size} tokens")
    bin_path, idx_path = _shard_paths(prefix)
    partial_bin, partial_idx = _partial_path(bin_path), _partial_path(idx_path)
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    token_type = DType.optimal_dtype(vocab_size)
    counts = {"documents": 0, "tokens": 0}
    builder = IndexedDatasetBuilder(str(partial_bin), dtype=token_type)
    try:
        for ids in _with_progress_bar(documents, f"writing {bin_path.name}", total_documents):
            if not len(ids):
                continue
            # int64 first: a narrower type would wrap an id outside the vocabulary into a wrong token.
            tokens = np.append(np.asarray(ids, dtype=np.int64), eod)
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(
                    f"document {counts['documents']} holds ids from {tokens.min()} to {tokens.max()}, outside the "
                    f"vocabulary of {vocab_size} tokens; was it encoded with another tokenizer?"
                )
            builder.add_item(torch.from_numpy(tokens))
            builder.end_document()
            counts["documents"] += 1
            counts["tokens"] += tokens.size
        if not counts["documents"]:
            raise UserError(f"{bin_path}: there is no document to write; check the input of this shard")
        builder.finalize(str(partial_idx))
        # A shard of the same name must never be half old, half new.
        idx_path.unlink(missing_ok=True)
        partial_bin.replace(bin_path)
        partial_idx.replace(idx_path)
    finally:
        # A plain file, though Megatron's optional storage client makes the type checker see a path.
        builder.data_file.close()  # pyright: ignore[reportAttributeAccessIssue]
        partial_bin.unlink(missing_ok=True)
        partial_idx.unlink(missing_ok=True)
    return ShardCounts(bytes=counts["tokens"] * np.dtype(token_type).itemsize, **counts)


def check_shard(prefix: str | Path) -> ShardCounts:
    """Check that PREFIX.bin and PREFIX.idx exist and belong together; a UserError says what is wrong and what to do.

    Megatron would answer the same faults with a bare assertion, or with wrong tokens. Reads the index, not the tokens.
    """
    import numpy as np

    bin_path, idx_path = _shard_paths(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
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
    # The longer form carries one mode byte per sequence.
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
    """The tokens of a checked shard as one read-only memory-mapped array [tokens], documents one after another."""
    import numpy as np

    check_shard(prefix)
    bin_path, idx_path = _shard_paths(prefix)
    with idx_path.open("rb") as stream:
        type_code = stream.read(INDEX_HEADER_BYTES)[len(INDEX_MAGIC) + 8]
    return np.memmap(bin_path, mode="r", dtype=TOKEN_TYPE_OF_CODE[type_code])


def _shard_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The .bin and the .idx; a dot in the prefix stays (Path.with_suffix would replace what follows it)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _partial_path(path: Path) -> Path:
    # The same name at every attempt, so what a killed process left behind is overwritten, not collected.
    return path.with_name(path.name + ".partial")


def _with_progress_bar(items: Iterable, description: str, total: int | None) -> Iterator:
    """Pass the items on, with a progress bar where stdout is a terminal and the work is not done at once."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        yield from items
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    start = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    progress = Progress(*columns, TimeRemainingColumn(), transient=True)
    task = progress.add_task(description, total=total)
    started = False
    try:
        for item in items:
            if not started and time.monotonic() - start > SECONDS_BEFORE_PROGRESS_BAR:
                progress.start()
                started = True
            yield item
            progress.advance(task)
    finally:
        if started:
            progress.stop()
