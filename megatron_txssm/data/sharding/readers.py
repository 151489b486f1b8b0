"""Reads the rows of one task as datatrove Documents, each with its source file and row.

datatrove's own readers number the rows that they keep, not those of the file, and drop rows without text, lines that
are not JSON and the rest of a damaged file with at most a log message. Here each of these is reported (`BrokenRows`).
"""

import contextlib
import io
import operator
import re
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep

from megatron_txssm.data.corpus.manifest import Slice
from megatron_txssm.data.sharding.broken_rows import (
    EMPTY_TEXT,
    INVALID_JSON,
    INVALID_UTF8,
    NULL_TEXT,
    UNREADABLE_FILE,
    BrokenRows,
)
from megatron_txssm.data.sharding.plan import PARQUET_SUFFIXES
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.schema import FILTER, PLACEHOLDER, SubsetSource

# Rows decoded at a time; 256 of 10 kB are 2.5 MB.
BATCH_ROWS = 256

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

Row = dict[str, object]
# The value of a field that a row does not have.
MISSING = object()
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowReader(PipelineStep):
    """Reads the slices of one task.

    A document's metadata: `file` and `row` (0-based, in the file), `origin` (str or None), and `blob` if the text
    must still be fetched.
    """

    name = "Rows"
    type = "READER"

    def __init__(self, subset: SubsetSource, pieces: tuple[Slice, ...], broken: BrokenRows) -> None:
        super().__init__()
        self.subset = subset
        self.pieces = pieces
        self.broken = broken
        self.filtered = 0
        # Share of the source bytes read so far, as far as it is known.
        self.progress = 0.0
        self.filters = [_Filter(text) for text in subset.filters]
        self.text_field = subset.blob_field or subset.text_field
        # Fields other than the text's; a row without text is broken.
        self.other_fields = {*(f.field for f in self.filters), *PLACEHOLDER.findall(subset.origin or "")}
        self.fields = {self.text_field, *self.other_fields}

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Generator[Document]:
        """The documents, in the order of files and rows; at most `limit`."""
        left = self.subset.limit
        total = sum(piece.bytes for piece in self.pieces) or 1
        for index, piece in enumerate(self.pieces):
            self.progress = sum(before.bytes for before in self.pieces[:index]) / total
            unseen, last = self.other_fields, None
            for number, row in self._rows(piece):
                self.broken.seen()
                if row is not None and unseen:
                    unseen, last = {field for field in unseen if _value(row, field) is MISSING}, row
                document = self._document(piece.file, number, row)
                if document is None:
                    continue
                yield document
                if left is not None and (left := left - 1) == 0:
                    break
            if unseen and last is not None:
                raise UserError(
                    f"{piece.file} has no field {min(unseen)!r} in any row that was read; the last has "
                    f"{', '.join(last)}: correct origin or filters of its subset"
                )
            if left == 0:
                return

    def _rows(self, piece: Slice) -> Iterator[tuple[int, Row | None]]:
        """(row number, fields), with None for a reported row; a file that fails is reported."""
        read = self._parquet if piece.file.endswith(PARQUET_SUFFIXES) else self._jsonl
        last = -1
        try:
            for number, row in read(piece):
                last = number
                yield number, row
        except UserError:
            raise
        except Exception as error:  # many kinds: truncated, wrong format, missing, of the network or a hub
            where = f"after row {last}: " if last >= 0 else ""
            self.broken.report(piece.file, None, UNREADABLE_FILE, f"{where}{type(error).__name__}: {error}")

    def _parquet(self, piece: Slice) -> Iterator[tuple[int, Row | None]]:
        with get_datafolder(self.subset.source).open(piece.file, "rb") as stream, pq.ParquetFile(stream) as file:
            columns = self._columns(piece, file.schema_arrow)
            rows = file.metadata.num_rows
            begin, end = rows * piece.part // piece.parts, rows * (piece.part + 1) // piece.parts
            groups, first = _row_groups(file, begin, end)
            before, share = self.progress, piece.bytes / (sum(other.bytes for other in self.pieces) or 1)
            number = first
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
                self.progress = before + share * max(0, number - begin) / max(1, end - begin)
                for row in _as_rows(batch):
                    if begin <= number < end:
                        yield number, row
                    number += 1

    def _columns(self, piece: Slice, schema: pa.Schema) -> list[str]:
        """The columns to read; of a struct, only the fields needed."""
        return sorted({self._column(piece, field, schema) for field in self.fields})

    def _column(self, piece: Slice, field: str, schema: pa.Schema) -> str:
        column, names, fields = "", field.split("."), schema
        while names:
            # A column's own name may contain dots.
            sizes = [size for size in reversed(range(1, len(names) + 1)) if ".".join(names[:size]) in fields.names]
            if not sizes:
                raise UserError(
                    f"{piece.file} has no field {field!r}; {column or 'it'} has {', '.join(fields.names)}: correct "
                    "text_field, blob_field, origin or filters of its subset"
                )
            name, names = ".".join(names[: sizes[0]]), names[sizes[0] :]
            column, fields = f"{column}.{name}".lstrip("."), fields.field(name).type
            # Fields of JSON in a text are not in the schema.
            if not pa.types.is_struct(fields):
                break
        return column

    def _jsonl(self, piece: Slice) -> Iterator[tuple[int, Row | None]]:
        with _open_lines(self.subset.source, piece.file) as stream:
            for number, line in enumerate(stream):
                line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.isspace() or not line:
                    continue
                try:
                    row = orjson.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("the line holds no object")
                except ValueError as error:
                    reason = INVALID_JSON if _is_utf8(line) else INVALID_UTF8
                    self.broken.report(piece.file, number, reason, str(error))
                    row = None
                yield number, row

    def _document(self, file: str, number: int, row: Row | None) -> Document | None:
        if row is None:
            return None
        if not all(keep(row) for keep in self.filters):
            self.filtered += 1
            return None
        text = _value(row, self.text_field)
        known = text is not MISSING
        text = text if known else None
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                self.broken.report(file, number, INVALID_UTF8, str(error))
                return None
        if not text:
            detail = "" if known else f"no field {self.text_field!r}; it has {', '.join(row)}"
            self.broken.report(file, number, NULL_TEXT if text is None else EMPTY_TEXT, detail)
            return None
        if not isinstance(text, str):
            raise UserError(f"{file}, row {number}: {self.text_field} is {type(text).__name__}, not text")
        metadata = {"file": file, "row": number, "origin": self._origin(row)}
        if self.subset.blob_field is not None:
            metadata["blob"], text = text, ""
        return Document(text=text, id=f"{file}:{number}", metadata=metadata)

    def _origin(self, row: Row) -> str | None:
        template = self.subset.origin
        if template is None:
            return None
        values = {name: _value(row, name) for name in PLACEHOLDER.findall(template)}
        if any(value is None or value is MISSING for value in values.values()):
            return None
        return PLACEHOLDER.sub(lambda found: str(_text(values[found[1]])), template)


class _Filter:
    """A condition such as `int_score >= 4` on a row; a row without the field does not meet it."""

    def __init__(self, text: str) -> None:
        found = FILTER.fullmatch(text)
        if found is None:
            raise UserError(f"filters: {text!r} must be FIELD OPERATOR VALUE, such as 'int_score >= 4'")
        self.field, self.operator, value = found.groups()
        number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value, re.IGNORECASE)
        self.value = float(value) if number else value.strip("'\"")

    def __call__(self, row: Row) -> bool:
        value = _text(_value(row, self.field))
        if isinstance(value, bool) and isinstance(self.value, str):
            value = str(value).lower()
        if not isinstance(value, str if isinstance(self.value, str) else int | float):
            return False
        return _OPERATORS[self.operator](value, self.value)


@contextlib.contextmanager
def _open_lines(source: str, file: str) -> Iterator[IO[bytes]]:
    """A file of lines, decompressed. Arrow reads zstd to the end of the last frame, and reports a truncated file."""
    packed = file.endswith(".zst")
    with get_datafolder(source).open(file, "rb", compression=None if packed else "infer") as stream:
        yield io.BufferedReader(pa.CompressedInputStream(stream, "zstd")) if packed else stream


def _row_groups(file: pq.ParquetFile, begin: int, end: int) -> tuple[list[int], int]:
    """The row groups that contain rows begin to end, and the number of their first row."""
    groups, first, start = [], 0, 0
    for index in range(file.num_row_groups):
        stop = start + file.metadata.row_group(index).num_rows
        if start < end and begin < stop:
            if not groups:
                first = start
            groups.append(index)
        start = stop
    return groups, first


def _as_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    """The rows of an Arrow batch, strings as bytes: one with invalid UTF-8 must not affect the others."""
    lists = [column.cast(_bytes_type(column.type)).to_pylist() for column in batch.columns]
    names = batch.schema.names
    for values in zip(*lists, strict=True):
        yield dict(zip(names, values, strict=True))


def _bytes_type(arrow: pa.DataType) -> pa.DataType:
    """An Arrow type with bytes in place of its strings, including those in structs and dictionaries."""
    if pa.types.is_dictionary(arrow):
        return _bytes_type(arrow.value_type)
    if pa.types.is_struct(arrow):
        fields = [arrow.field(index) for index in range(arrow.num_fields)]
        return pa.struct([field.with_type(_bytes_type(field.type)) for field in fields])
    if pa.types.is_string(arrow) or pa.types.is_string_view(arrow):
        return pa.binary()
    return pa.large_binary() if pa.types.is_large_string(arrow) else arrow


def _value(row: object, field: str) -> object:
    """The value of a field, or MISSING; `a.b` is a field of this name, or field b of a, a struct or JSON.

    Any field of null is null.
    """
    if isinstance(row, str | bytes):
        try:
            row = orjson.loads(row)
        except ValueError:
            return MISSING
    if row is None:
        return None
    if not isinstance(row, dict):
        return MISSING
    if field in row:
        return row[field]
    names = field.split(".")
    for number in reversed(range(1, len(names))):
        if (outer := ".".join(names[:number])) in row:
            return _value(row[outer], ".".join(names[number:]))
    return MISSING


def _text(value: object) -> object:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
