"""A small SmolLM-Corpus in the schemas of the real one, from text that every machine has: Python's own library.

The same Python gives the same files. Texts are returned as they went in, to compare with what comes out.
"""

import functools
import gzip
import hashlib
import itertools
import json
import pydoc_data.topics
import random
import sysconfig
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

FINEWEB, COSMOPEDIA, PYTHON_EDU = "fineweb-edu-dedup", "cosmopedia-v2", "python-edu"

# As the dataset's card declares them.
SCHEMAS = {
    FINEWEB: pa.schema(
        {
            "text": pa.string(),
            "id": pa.string(),
            "metadata": pa.struct(
                {
                    "dump": pa.string(),
                    "url": pa.string(),
                    "date": pa.timestamp("s"),
                    "file_path": pa.string(),
                    "language": pa.string(),
                    "language_score": pa.float64(),
                    "token_count": pa.int64(),
                    "score": pa.float64(),
                    "int_score": pa.int64(),
                }
            ),
        }
    ),
    COSMOPEDIA: pa.schema(
        {
            "prompt": pa.string(),
            "text": pa.string(),
            "token_length": pa.int64(),
            "audience": pa.string(),
            "format": pa.string(),
            "seed_data": pa.string(),
        }
    ),
    PYTHON_EDU: pa.schema(
        {
            "blob_id": pa.string(),
            "repo_name": pa.string(),
            "path": pa.string(),
            "length_bytes": pa.int64(),
            "score": pa.float64(),
            "int_score": pa.int64(),
        }
    ),
}

# What trips readers, tokenizers and counters of bytes. None is empty: an empty text is a broken row.
ODD_TEXTS = (
    "x",
    " ",
    "\n\n\n",
    "  leading and trailing spaces  \n",
    "\r\nlines\r\nof\r\nDOS\r\n",
    "tabs\tand\vother\fwhite\u00a0space\u2003\u3000",
    "深層学習は、ニューラルネットワークによる機械学習である。한국어 텍스트와 中文文本。",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈, flags 🇩🇪🇯🇵, and a lone variation selector \ufe0f",
    "combining e\u0301, right to left שלום مرحبا, zero\u200bwidth, \ufeff a byte order mark",
    "one document<|endoftext|>that looks like two",
    "<|endoftext|>",
    "</s><s>[INST] other tokenizers' [/INST]",
    "NUL \0 and escape \x1b[31m",
    "𝕬𝖘𝖙𝖗𝖆𝖑 planes 𐍈 and the last one \U0010fffd",
    "a" * 20_000,
    "0123456789 " * 3_000,
)

# Characters; the library has some tables of 200,000.
LONGEST_PIECE = 30_000
# Not on every machine, or the same thing again and again.
_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
)
# Written for one machine.
_EXCLUDED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")

Row = dict[str, Any]


@dataclass(frozen=True)
class SmolLMSources:
    """Where a small corpus lies, and the texts of each subset in the order of its files and rows."""

    folder: Path
    # Subset -> folder with its parquet files.
    folders: dict[str, Path]
    texts: dict[str, list[str]]
    # What a document comes from, as the row says: the URL, nothing, repository and path.
    origins: dict[str, list[str | None]]
    # python-edu: one gzip file per text, named by its id.
    blobs: Path

    @property
    def blob_url(self) -> str:
        return f"file://{self.blobs}/{{blob_id}}"


def library_texts(number: int, seed: int = 0) -> list[str]:
    """That many different texts of 1 to some 30,000 characters, code and prose; the odd ones are among them."""
    pieces = list(_library_pieces())
    random.Random(seed).shuffle(pieces)
    texts = [text for text in dict.fromkeys((*ODD_TEXTS, *pieces)) if text][:number]
    texts += [f"{texts[index % len(texts)]}\n# copy {index}\n" for index in range(len(texts), number)]
    random.Random(seed + 1).shuffle(texts)
    return texts


@functools.cache
def _library_pieces() -> tuple[str, ...]:
    """Entries of the language reference, and top-level blocks of the library's modules, one to four together."""
    random_lengths = random.Random(0)
    library = Path(sysconfig.get_path("stdlib"))
    pieces = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    for path in sorted(library.rglob("*.py")):
        if _EXCLUDED_FOLDERS.intersection(path.relative_to(library).parts) or path.name.startswith(_EXCLUDED_FILES):
            continue
        blocks = path.read_text(encoding="utf-8", errors="ignore").split("\n\n\n")
        while blocks:
            length = random_lengths.randint(1, 4)
            pieces.append("\n\n\n".join(blocks[:length]))
            del blocks[:length]
    return tuple(piece for piece in pieces if len(piece) <= LONGEST_PIECE)


def make_smollm_corpus(
    folder: Path, *, documents_per_subset: int = 60, files_per_subset: int = 3, row_group_size: int = 7
) -> SmolLMSources:
    """Write FOLDER/SUBSET/train-0000I-of-0000N.parquet for the three subsets, and FOLDER/blobs."""
    blobs = folder / "blobs"
    blobs.mkdir(parents=True)
    texts, origins = {}, {}
    for seed, subset in enumerate(SCHEMAS):
        texts[subset] = library_texts(documents_per_subset, seed)
        rows = [_ROWS[subset](index, text) for index, text in enumerate(texts[subset])]
        origins[subset] = [_origin(row) for row in rows]
        write_parquet(folder / subset, rows, SCHEMAS[subset], files_per_subset, row_group_size)
        if subset == PYTHON_EDU:
            for row, text in zip(rows, texts[subset], strict=True):
                write_blob(blobs, row["blob_id"], text)
    return SmolLMSources(folder, {subset: folder / subset for subset in SCHEMAS}, texts, origins, blobs)


def _origin(row: Row) -> str | None:
    if "metadata" in row:
        return row["metadata"]["url"]
    return row["repo_name"] + row["path"] if "repo_name" in row else None


def fineweb_row(index: int, text: str) -> Row:
    metadata = {
        "dump": f"CC-MAIN-{2013 + index % 11}-{10 + index % 40}",
        "url": f"https://www.example.org/lessons/{index}?page={index % 3}",
        "date": datetime(2013, 5, 18) + timedelta(hours=31 * index),
        "file_path": f"s3://commoncrawl/crawl-data/segments/{index % 7}/warc/{index:05d}.warc.gz",
        "language": "en",
        "language_score": 0.65 + (index % 35) / 100,
        "token_count": len(text) // 4,
        "score": 2.5 + (index % 25) / 10,
        "int_score": 3 + index % 3,
    }
    return {"text": text, "id": f"<urn:uuid:{uuid.UUID(int=index)}>", "metadata": metadata}


def cosmopedia_row(index: int, text: str) -> Row:
    return {
        "prompt": f"Write a course unit about topic {index} that a {index % 9}-year-old can follow.",
        "text": text,
        "token_length": len(text) // 4,
        "audience": ("general", "young_children", "college_students")[index % 3],
        "format": ("textbook", "blogpost", "story_reddit")[index % 3],
        "seed_data": ("fineweb", "openstax", "stanford")[index % 3],
    }


def python_edu_row(index: int, text: str) -> Row:
    data = text.encode()
    return {
        # What Software Heritage names a content by: git's id of a blob.
        "blob_id": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        "repo_name": f"owner{index % 5}/repository-{index % 11}",
        "path": f"/src/module_{index}.py",
        "length_bytes": len(data),
        "score": 3.5 + (index % 15) / 10,
        "int_score": 4 + index % 2,
    }


_ROWS: dict[str, Callable[[int, str], Row]] = {
    FINEWEB: fineweb_row,
    COSMOPEDIA: cosmopedia_row,
    PYTHON_EDU: python_edu_row,
}


def write_blob(folder: Path, blob_id: str, text: str) -> None:
    (folder / blob_id).write_bytes(gzip.compress(text.encode(), mtime=0))


def write_parquet(folder: Path, rows: Sequence[Row], schema: Any, files: int, row_group_size: int) -> list[Path]:
    """Rows over several files, unevenly; the files in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, part in enumerate(_uneven_parts(rows, files)):
        paths.append(folder / f"train-{index:05d}-of-{files:05d}.parquet")
        pq.write_table(pa.Table.from_pylist(part, schema), paths[-1], row_group_size=row_group_size)
    return paths


def write_jsonl(folder: Path, rows: Sequence[Row], files: int, suffix: str = ".jsonl") -> list[Path]:
    """The same as lines of JSON. suffix: .jsonl, .jsonl.gz or .jsonl.zst."""
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".jsonl": lambda data: data,
        ".jsonl.gz": lambda data: gzip.compress(data, mtime=0),
        ".jsonl.zst": lambda data: zstandard.ZstdCompressor().compress(data),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, part in enumerate(_uneven_parts(rows, files)):
        # default: dates become text.
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in part)
        paths.append(folder / f"train-{index:05d}-of-{files:05d}{suffix}")
        paths[-1].write_bytes(compress[suffix](lines.encode()))
    return paths


def _uneven_parts(rows: Sequence[Row], parts: int) -> Iterator[list[Row]]:
    """The first part is the shortest: 1, 2, 3 … shares of the rows."""
    shares = parts * (parts + 1) // 2
    ends = [len(rows) * (index * (index + 1) // 2) // shares for index in range(parts + 1)]
    for begin, end in itertools.pairwise(ends):
        yield list(rows[begin:end])
