"""Rows of every kind of file, each with its place; what cannot be used is counted there, and the others are kept."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_txssm.data.corpus.manifest import Slice
from megatron_txssm.data.sharding.broken_rows import (
    EMPTY_TEXT,
    INVALID_JSON,
    INVALID_UTF8,
    NULL_TEXT,
    UNREADABLE_FILE,
    BrokenRows,
)
from megatron_txssm.data.sharding.readers import BATCH_ROWS, RowReader
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.schema import SubsetSource
from tests.data.corpora import FINEWEB, ODD_TEXTS, SCHEMAS, fineweb_row, write_jsonl, write_parquet
from tests.data.in_process import manifest_of, shard, web_recipe

NOT_UTF8 = b"caf\xe9 \xff"
TEXTS = [f"text {number}" for number in range(8)]


class Read:
    """What a reader gives for some files of a folder."""

    def __init__(
        self, folder: Path, *files: str, most_broken: float = 1, most_broken_files: int = 9, **fields: Any
    ) -> None:
        self.broken = BrokenRows("web", max_broken_fraction=most_broken, max_broken_files=most_broken_files)
        pieces = tuple(Slice(file, 0, 1, 10) for file in files)
        self.reader = RowReader(SubsetSource(source=str(folder), **fields), pieces, self.broken)
        self.documents = list(self.reader.run())

    @property
    def texts(self) -> list[str]:
        return [document.text for document in self.documents]

    @property
    def rows(self) -> list[tuple[str, int]]:
        return [(document.metadata["file"], document.metadata["row"]) for document in self.documents]

    @property
    def origins(self) -> list[str | None]:
        return [document.metadata["origin"] for document in self.documents]

    @property
    def places(self) -> list[tuple[str, int | None, str]]:
        return [(place["file"], place["row"], place["reason"]) for place in self.broken.places]


def write_table(path: Path, row_group_size: int = 3, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def strings(values: Sequence[bytes | None], arrow: Any = None) -> Any:
    """An array of strings whose bytes are as given, UTF-8 or not."""
    arrow = arrow or pa.string()
    array = pa.array(values, pa.large_binary() if pa.types.is_large_string(arrow) else pa.binary())
    return pa.Array.from_buffers(arrow, len(array), array.buffers(), array.null_count)


def lines_of(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


PACKED = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".json.gz": gzip.compress, ".jsonl.zst": zstd}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_every_format_gives_the_same_documents_with_their_places(tmp_path: Path, suffix: str) -> None:
    texts = [*ODD_TEXTS, *(f"document {number}" for number in range(2 * BATCH_ROWS))]
    rows = [fineweb_row(number, text) for number, text in enumerate(texts)]
    if suffix == ".parquet":
        paths = write_parquet(tmp_path, rows, SCHEMAS[FINEWEB], 2, 100)
    else:
        paths = write_jsonl(tmp_path, rows, 2, suffix)
    read = Read(tmp_path, *(path.name for path in paths), origin="{metadata.url}|{metadata.score}|{id}")
    assert read.texts == texts
    first = read.rows.index((paths[1].name, 0))
    assert read.rows == [(paths[0].name, n) for n in range(first)] + [
        (paths[1].name, n) for n in range(len(texts) - first)
    ]
    assert read.origins == [f"{row['metadata']['url']}|{row['metadata']['score']}|{row['id']}" for row in rows]
    assert read.broken.rows == len(texts) and read.places == []


@pytest.mark.parametrize(
    "arrow",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_texts_may_be_stored_as_any_type_of_string(tmp_path: Path, arrow: Any) -> None:
    write_table(tmp_path / "a.parquet", text=pa.array(["one", None, "", "für"]).cast(arrow))
    read = Read(tmp_path, "a.parquet")
    assert read.texts == ["one", "für"] and read.rows == [("a.parquet", 0), ("a.parquet", 3)]
    assert read.places == [("a.parquet", 1, NULL_TEXT), ("a.parquet", 2, EMPTY_TEXT)]


@pytest.mark.parametrize("arrow", [pa.string(), pa.large_string(), pa.binary()], ids=str)
def test_invalid_utf8_in_a_parquet_column_costs_its_row_alone(tmp_path: Path, arrow: Any) -> None:
    values: list[bytes | None] = [text.encode() for text in TEXTS]
    values[2] = values[5] = NOT_UTF8
    column = pa.array(values, arrow) if arrow == pa.binary() else strings(values, arrow)
    write_table(tmp_path / "a.parquet", text=column)
    read = Read(tmp_path, "a.parquet")
    assert read.texts == [text for number, text in enumerate(TEXTS) if number not in (2, 5)]
    assert read.places == [("a.parquet", 2, INVALID_UTF8), ("a.parquet", 5, INVALID_UTF8)]
    assert read.broken.rows == len(TEXTS)


def test_invalid_utf8_in_another_field_costs_no_row(tmp_path: Path) -> None:
    urls = strings([b"a", NOT_UTF8, None, b"d"])
    structure = pa.StructArray.from_arrays([urls, pa.array([1, 2, 3, 4])], ["url", "score"])
    write_table(tmp_path / "a.parquet", text=TEXTS[:4], url=urls, metadata=structure)
    for field in ("url", "metadata.url"):
        read = Read(tmp_path, "a.parquet", origin=f"from {{{field}}}")
        assert read.texts == TEXTS[:4] and read.places == []
        assert read.origins == ["from a", "from caf\ufffd \ufffd", None, "from d"]
        assert Read(tmp_path, "a.parquet", filters=(f"{field} == d",)).texts == [TEXTS[3]]


def test_a_text_within_a_structure_is_read_row_by_row(tmp_path: Path) -> None:
    body = pa.StructArray.from_arrays(
        [strings([b"one", NOT_UTF8, None, b"", b"five"])], ["text"], mask=pa.array([False] * 4 + [True])
    )
    write_table(tmp_path / "a.parquet", body=body)
    read = Read(tmp_path, "a.parquet", text_field="body.text")
    assert read.texts == ["one"]
    assert [(row, reason) for _, row, reason in read.places] == [
        (1, INVALID_UTF8),
        (2, NULL_TEXT),
        (3, EMPTY_TEXT),
        (4, NULL_TEXT),
    ]


@pytest.mark.parametrize("suffix", PACKED)
def test_lines_that_cannot_be_used_are_counted_with_their_row(tmp_path: Path, suffix: str) -> None:
    broken = {
        1: (b'{"text": "caf\xe9"}', INVALID_UTF8),
        2: (b'{"text": "cut of', INVALID_JSON),
        4: (b'["text"]', INVALID_JSON),
        5: (b"\0", INVALID_JSON),
        6: (b'{"text": null}', NULL_TEXT),
        7: (b'{"text": ""}', EMPTY_TEXT),
        9: (b'{"body": "another field"}', NULL_TEXT),
        10: (b'{"text": "\\ud800"}', INVALID_JSON),
        11: (b'{"text": NaN}', INVALID_JSON),
    }
    good = {0: "first", 3: "line\u2028separator", 8: "\x85 next", 12: "last"}
    lines = [broken[n][0] if n in broken else json.dumps({"text": good[n]}).encode() for n in range(13)]
    # No newline at the end.
    (tmp_path / f"a{suffix}").write_bytes(PACKED[suffix](b"\n".join(lines)))
    read = Read(tmp_path, f"a{suffix}")
    assert dict(zip((row for _, row in read.rows), read.texts, strict=True)) == good
    assert read.places == [(f"a{suffix}", row, reason) for row, (_, reason) in broken.items()]
    assert read.broken.rows == 13


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_of_several_frames_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    texts = [f"{number}: {'word ' * (number % 50)}" for number in range(3000)]
    parts = [lines_of(texts[:1000]), lines_of(texts[1000:1001]), lines_of(texts[1001:])]
    (tmp_path / f"a{suffix}").write_bytes(b"".join(map(PACKED[suffix], parts)))
    read = Read(tmp_path, f"a{suffix}")
    assert read.texts == texts and read.places == []


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_packed_file_that_is_cut_off_is_no_file_that_ends(tmp_path: Path, suffix: str, kept: float) -> None:
    texts = [f"{number}: {hash((number, 1))}" for number in range(20_000)]
    data = PACKED[suffix](lines_of(texts))
    (tmp_path / f"a{suffix}").write_bytes(data[: int(kept * len(data))])
    (tmp_path / "b.jsonl").write_bytes(lines_of(TEXTS))
    read = Read(tmp_path, f"a{suffix}", "b.jsonl")
    count = len(read.texts) - len(TEXTS)
    assert 0.3 * kept * len(texts) < count < len(texts)
    assert read.texts == texts[:count] + TEXTS
    assert [place for place in read.places if place[1] is None] == [(f"a{suffix}", None, UNREADABLE_FILE)]
    (detail,) = [place["detail"] for place in read.broken.places if place["row"] is None]
    assert detail.startswith(f"after row {read.broken.rows - len(TEXTS) - 1}: ")


def parquet_bytes(folder: Path, rows: int) -> bytes:
    write_table(folder / "whole.parquet", row_group_size=100, text=[f"{n}: " + "x" * 200 for n in range(rows)])
    return (folder / "whole.parquet").read_bytes()


def test_a_parquet_file_that_is_cut_off_is_named_and_the_next_one_read(tmp_path: Path) -> None:
    data = parquet_bytes(tmp_path, 1000)
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.parquet").write_bytes(b"")
    write_table(tmp_path / "c.parquet", text=TEXTS)
    read = Read(tmp_path, "a.parquet", "b.parquet", "missing.parquet", "missing.jsonl", "c.parquet")
    assert read.texts == TEXTS
    unreadable = ["a.parquet", "b.parquet", "missing.parquet", "missing.jsonl"]
    assert read.places == [(name, None, UNREADABLE_FILE) for name in unreadable]
    assert "FileNotFoundError" in read.broken.places[2]["detail"] and read.broken.rows == len(TEXTS)


def test_a_parquet_file_with_a_damaged_middle_says_how_far_it_was_read(tmp_path: Path) -> None:
    data = bytearray(parquet_bytes(tmp_path, 2000))
    offset = pq.read_metadata(tmp_path / "whole.parquet").row_group(12).column(0).data_page_offset
    data[offset : offset + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    read = Read(tmp_path, "a.parquet")
    count = len(read.texts)
    # Rows come in batches.
    assert 1200 - BATCH_ROWS <= count <= 1200 and read.texts == [f"{n}: " + "x" * 200 for n in range(count)]
    assert read.places == [("a.parquet", None, UNREADABLE_FILE)]
    assert read.broken.places[0]["detail"].startswith(f"after row {count - 1}: ")


def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(lines_of(TEXTS))
    read = Read(tmp_path, "a.parquet", "a.jsonl.gz", "a.jsonl.zst")
    assert read.documents == [] and [place[1:] for place in read.places] == [(None, UNREADABLE_FILE)] * 3


def test_too_many_broken_rows_stop_the_reader_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["good"]) * 900 + b"no json\n" * 200 + lines_of(["good"]) * 10_000)
    with pytest.raises(UserError, match=r"max_broken_fraction=0.01 is exceeded: 10\d of 1,00\d rows broken") as caught:
        Read(tmp_path, "a.jsonl", most_broken=0.01)
    assert "a.jsonl, row 900: invalid JSON" in str(caught.value)
    assert len(Read(tmp_path, "a.jsonl", most_broken=0.2).texts) == 10_900


def test_one_unreadable_file_too_many_stops_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(TEXTS))
    assert Read(tmp_path, "gone.jsonl", "a.jsonl", most_broken_files=1).texts == TEXTS
    with pytest.raises(UserError, match=r"max_broken_files=0 is exceeded(.|\n)*gone\.jsonl: unreadable file"):
        Read(tmp_path, "gone.jsonl", "a.jsonl", most_broken_files=0)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"text_field": "txt"}, "txt"),
        ({"origin": "{url}"}, "url"),
        ({"filters": ("score > 3",)}, "score"),
        ({"blob_field": "blob_id"}, "blob_id"),
        ({"origin": "{metadata.uri}"}, "metadata.uri"),
        ({"filters": ("metadata.inner.x > 3",)}, "metadata.inner.x"),
    ],
)
def test_a_field_that_a_parquet_file_lacks_is_a_mistake_of_the_recipe(tmp_path: Path, fields: Any, name: str) -> None:
    metadata = [{"url": "a", "inner": {"y": 1}}]
    write_table(tmp_path / "a.parquet", text=["one"], metadata=metadata)
    with pytest.raises(UserError, match=f"a.parquet has no field '{name}'; .* has .*: correct text_field, blob_field"):
        Read(tmp_path, "a.parquet", **fields)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_text_that_is_a_number_is_a_mistake_of_the_recipe(tmp_path: Path, suffix: str) -> None:
    write_table(tmp_path / "a.parquet", text=[5])
    (tmp_path / "a.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(UserError, match=f"a{suffix}, row 0: text is int, not text"):
        Read(tmp_path, f"a{suffix}")


# What a row may hold for a filter, in both formats.
FILTERED: list[dict[str, Any]] = [
    {"score": 1, "ratio": 0.5, "lang": "en", "ok": True, "meta": {"lang": "de", "n": 3}},
    {"score": 4, "ratio": -2.0, "lang": "de", "ok": False, "meta": {"lang": "en", "n": None}},
    {"score": None, "ratio": None, "lang": None, "ok": None, "meta": None},
    {"score": 5, "ratio": 1e-3, "lang": "5", "ok": True, "meta": {"lang": None, "n": 10}},
]


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("score >= 4", {1, 3}),
        ("score > 4", {3}),
        ("score == 4", {1}),
        ("score == 4.0", {1}),
        ("score != 4", {0, 3}),
        ("score < +5", {0, 1}),
        ("score <= 1e0", {0}),
        ("ratio < -1.5", {1}),
        ("ratio>.0005", {0, 3}),
        ("lang == en", {0}),
        ("lang == 'en'", {0}),
        ('lang != "en"', {1, 3}),
        ("lang == '5'", {3}),
        ("lang == 5", set()),
        ("lang > de", {0}),
        ("ok == true", {0, 3}),
        ("ok != true", {1}),
        ("ok == 0", {1}),
        ("meta.lang == en", {1}),
        ("meta.n >= 3", {0, 3}),
        ("meta == x", set()),
    ],
)
def test_filters_keep_rows_that_have_the_field_and_meet_the_condition(
    tmp_path: Path, condition: str, kept: set[int]
) -> None:
    rows = [{"text": TEXTS[number], **row} for number, row in enumerate(FILTERED)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    # A field of JSON within a text.
    packed = [row | {"meta": json.dumps(row["meta"])} for row in rows]
    pq.write_table(pa.Table.from_pylist(packed), tmp_path / "b.parquet")
    for file in ("a.jsonl", "a.parquet", "b.parquet"):
        read = Read(tmp_path, file, filters=(condition,))
        assert {row for _, row in read.rows} == kept, file
        assert read.reader.filtered == len(rows) - len(kept) and read.broken.rows == len(rows) and not read.places


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"filters": ("scor > 3",)}, "scor"),
        ({"filters": ("score.deeper == 1",)}, "score.deeper"),
        ({"filters": ("meta.score > 3",)}, "meta.score"),
        ({"filters": ("score > 0", "ratoi > 0")}, "ratoi"),
        ({"origin": "{adress}"}, "adress"),
        ({"origin": "{adress}", "limit": 2}, "adress"),
    ],
)
def test_a_field_that_no_row_of_a_file_has_is_a_mistake_of_the_recipe(
    tmp_path: Path, fields: dict[str, Any], name: str
) -> None:
    rows = [{"text": "x", **row} for row in FILTERED if row["meta"] is not None]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        Read(tmp_path, "a.jsonl", **fields)
    assert str(caught.value) == (
        f"a.jsonl has no field {name!r} in any row that was read; the last has text, score, ratio, lang, ok, meta: "
        "correct origin or filters of its subset"
    )
    # One row that has it is enough: a field may be optional. What lies within null may be there.
    outer, _, inner = name.partition(".")
    for row in ({"text": "x", outer: {inner: 9} if inner else 9}, {"text": "x", outer: None}):
        (tmp_path / "b.jsonl").write_text('{"text": "first"}\n' + json.dumps({"score": 9, **row}) + "\n")
        Read(tmp_path, "b.jsonl", **fields)


def test_blank_lines_and_byte_order_marks_are_no_rows(tmp_path: Path) -> None:
    for suffix, pack in PACKED.items():
        first, second = (json.dumps({"text": text}) for text in TEXTS[:2])
        content = f"\ufeff\n\n{first}\r\n \t\n\ufeff{second}\n\n\n"
        (tmp_path / f"a{suffix}").write_bytes(pack(content.encode()))
        read = Read(tmp_path, f"a{suffix}", most_broken=0)
        # Rows are lines, so that a document is found again.
        assert read.texts == TEXTS[:2] and [row for _, row in read.rows] == [2, 4] and read.broken.rows == 2


def test_a_field_with_a_dot_is_a_column_of_this_name_or_one_within_another(tmp_path: Path) -> None:
    flat = [{"doc.text": TEXTS[0], "doc.meta": {"url.raw": "u"}, "doc": None}]
    nested = [{"doc": {"text": TEXTS[0], "meta": {"url.raw": "u"}}}]
    packed = [{"doc": json.dumps(nested[0]["doc"])}]
    for number, rows in enumerate((flat, nested, packed)):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(rows[0]) + "\n")
        write_table(tmp_path / f"{number}.parquet", **pa.Table.from_pylist(rows).to_pydict())
        for file in (f"{number}.jsonl", f"{number}.parquet"):
            fields: dict[str, Any] = {"origin": "{doc.meta.url.raw}", "filters": ("doc.text != x",)}
            read = Read(tmp_path, file, text_field="doc.text", **fields)
            assert (read.texts, read.origins) == (TEXTS[:1], ["u"]), file


def test_every_filter_must_be_met(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "x", "a": n % 2, "b": n % 3}) + "\n" for n in range(12))
    )
    read = Read(tmp_path, "a.jsonl", filters=("a == 1", "b == 2"))
    assert [row for _, row in read.rows] == [n for n in range(12) if n % 2 == 1 and n % 3 == 2]


def test_a_row_that_is_filtered_out_is_not_broken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null, "a": 1}\n{"text": null, "a": 2}\n{"text": "x", "a": 2}\n')
    read = Read(tmp_path, "a.jsonl", filters=("a == 2",))
    assert read.texts == ["x"] and read.reader.filtered == 1 and read.places == [("a.jsonl", 1, NULL_TEXT)]


def test_limit_counts_documents_over_the_files_of_a_task(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"no json\n" + lines_of(TEXTS[:3]))
    (tmp_path / "b.jsonl").write_bytes(lines_of(TEXTS[3:]))
    read = Read(tmp_path, "a.jsonl", "b.jsonl", limit=5)
    assert read.texts == TEXTS[:5]
    assert read.broken.rows == 6 and read.places == [("a.jsonl", 0, INVALID_JSON)]
    assert Read(tmp_path, "a.jsonl", "b.jsonl", limit=100).texts == TEXTS


def test_origins_take_nested_fields_numbers_and_json_in_a_text(tmp_path: Path) -> None:
    metadata: list[Any] = [{"url": "http://a/?{x}", "n": 7}, {"url": None, "n": 8}, None]
    rows = [{"text": TEXTS[n], "id": n, "metadata": value} for n, value in enumerate(metadata)]
    write_table(tmp_path / "a.parquet", **pa.Table.from_pylist(rows).to_pydict())
    as_json = [row | {"metadata": json.dumps(row["metadata"])} for row in rows]
    write_table(tmp_path / "b.parquet", **pa.Table.from_pylist(as_json).to_pydict())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_json))
    for file in ("a.parquet", "b.parquet", "a.jsonl", "b.jsonl"):
        read = Read(tmp_path, file, origin="{metadata.url}#{id}")
        assert read.origins == ["http://a/?{x}#0", None, None], file
        assert Read(tmp_path, file, origin="{metadata.n} of {id}").origins == ["7 of 0", "8 of 1", None]
        assert Read(tmp_path, file, origin="{id}").origins == ["0", "1", "2"]
        assert Read(tmp_path, file).origins == [None, None, None]


def test_the_progress_grows_to_the_share_that_is_read(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", row_group_size=BATCH_ROWS, text=["x"] * 4 * BATCH_ROWS)
    (tmp_path / "b.jsonl").write_bytes(lines_of(TEXTS))
    pieces = (Slice("a.parquet", 0, 1, 300), Slice("b.jsonl", 0, 1, 100))
    reader = RowReader(SubsetSource(source=str(tmp_path)), pieces, BrokenRows("web", max_broken_fraction=0))
    found = [reader.progress for _ in reader.run()]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 0.75
    assert found[2 * BATCH_ROWS] == pytest.approx(0.375)


def source_with_faults(folder: Path) -> Path:
    source = folder / "source"
    source.mkdir()
    values: list[bytes | None] = [f"text {number}".encode() for number in range(50)]
    values[7], values[8], values[33] = None, b"", NOT_UTF8
    write_table(source / "a.parquet", row_group_size=20, text=strings(values))
    (source / "b.jsonl").write_bytes(lines_of(TEXTS) + b"no json\n")
    data = parquet_bytes(folder, 10)
    (source / "c.parquet").write_bytes(data[:-20])
    return source


def test_the_command_stops_at_too_many_faults_names_them_and_publishes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = web_recipe(tmp_path, source_with_faults(tmp_path), max_broken_files=1)
    assert shard(recipe) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and "Traceback" not in message
    assert "subsets.web.max_broken_fraction=0.001 is exceeded: 4 of 59 rows broken" in message
    for place in (
        "a.parquet, row 7: null text",
        "a.parquet, row 8: empty text",
        "a.parquet, row 33: invalid UTF-8",
        "b.jsonl, row 8: invalid JSON",
        "c.parquet: unreadable file",
    ):
        assert place in message
    left = {path.name for path in (tmp_path / "corpus" / "web").iterdir()}
    assert left <= {"00000.status.json", "00000.lock"}

    assert shard(recipe, "--set", "subsets.web.max_broken_fraction=1", "--set", "subsets.web.max_broken_files=0") == 2
    assert "subsets.web.max_broken_files=0 is exceeded" in capsys.readouterr().err


def test_with_a_higher_threshold_the_command_finishes_and_the_manifest_holds_the_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = web_recipe(tmp_path, source_with_faults(tmp_path), max_broken_files=1, max_broken_fraction=0.1)
    assert shard(recipe) == 0
    manifest = manifest_of(tmp_path / "corpus")
    assert (manifest.rows, manifest.filtered) == (59, 0)
    assert manifest.broken == {EMPTY_TEXT: 1, INVALID_JSON: 1, INVALID_UTF8: 1, NULL_TEXT: 1, UNREADABLE_FILE: 1}
    assert [(place["file"], place["row"], place["reason"]) for place in manifest.broken_places] == [
        ("a.parquet", 7, NULL_TEXT),
        ("a.parquet", 8, EMPTY_TEXT),
        ("a.parquet", 33, INVALID_UTF8),
        ("b.jsonl", 8, INVALID_JSON),
        ("c.parquet", None, UNREADABLE_FILE),
    ]
    assert manifest.shards["train"].documents == 59 - 4
    totals = json.loads((tmp_path / "corpus" / "web" / "manifest.json").read_bytes())
    assert totals["broken"] == manifest.broken and totals["rows"] == 59 and totals["train"]["documents"] == 55
    assert "1 × invalid UTF-8" in capsys.readouterr().out


def test_a_task_without_a_usable_row_is_finished_and_holds_no_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_bytes(lines_of(TEXTS))
    assert shard(web_recipe(tmp_path, source, filters=["text == other"])) == 0
    manifest = manifest_of(tmp_path / "corpus")
    assert manifest.shards == {} and manifest.filtered == manifest.rows == len(TEXTS)
    assert "web: 8 of 8 rows excluded by its filters" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "corpus" / "web").iterdir()} == {"00000.json", "manifest.json"}
