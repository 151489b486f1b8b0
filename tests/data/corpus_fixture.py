"""A finished corpus made of token lists, without texts or a tokeniser at work, and a recipe that trains on it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_txssm.data.corpus.manifest import Plan, ShardRecord, Slice, TaskManifest, write_manifest, write_plan
from megatron_txssm.data.corpus.shard import write_shard
from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer, train_sentencepiece
from megatron_txssm.files import write_json
from megatron_txssm.recipe.changes import Changes
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts
from tests.support.recipes import write_recipe

VOCAB_SIZE = 300
# Ids from here on may stand in a document: below are the unknown token and the end of a document.
FIRST_TOKEN = 2
# The shards' vocabulary, so that tokens may also be numbers that the tokenizer does not know.
VOCAB_SIZE_OF_NUMBERS = 60_000

# Documents of a task: token lists without the end.
Task = Sequence[Sequence[int]]


def make_corpus(
    directory: Path, subsets: Mapping[str, Sequence[Task]], validation: Mapping[str, Sequence[Task]] | None = None
) -> Path:
    """Write a corpus with one shard a task and split; document n of a task is row 3n of `SUBSET/TASK.parquet`."""
    fingerprint = _make_tokenizer(directory / "tokenizer")
    rows = {name: tuple((_source(name, task),) for task in range(len(tasks))) for name, tasks in subsets.items()}
    write_plan(directory, Plan(rows))
    for name, tasks in subsets.items():
        for task, documents in enumerate(tasks):
            shards = {"train": _write_split(directory, name, task, "train", documents)}
            if validation and name in validation:
                shards["validation"] = _write_split(directory, name, task, "validation", validation[name][task])
            manifest = TaskManifest(
                subset=name,
                task=task,
                sources=rows[name][task],
                rows=len(documents),
                filtered=0,
                broken={},
                broken_places=(),
                tokenizer=fingerprint,
                encoder="none",
                compared_documents=0,
                shards=shards,
            )
            write_manifest(directory, manifest)
    return directory


def make_recipe(folder: Path, corpus: Path) -> Path:
    """A tiny model's recipe file on a corpus."""
    changes: Changes = {"name": "corpus", "training.global_batch_tokens": 512, **corpus_of(corpus)}
    return write_recipe(folder / "recipe.yaml", changes, run=folder / "run")


def corpus_of(corpus: Path, vocab_size: int = VOCAB_SIZE) -> Changes:
    """The fields of a recipe that trains on it."""
    return {"data.corpus": str(corpus), "data.vocab_size": vocab_size}


def numbered_documents(count: int, seed: int, first: int = FIRST_TOKEN) -> list[list[int]]:
    """Documents of 5 to 69 tokens, each of which stands nowhere else: they count up from `first`."""
    draw, documents = random.Random(seed), []
    for _ in range(count):
        length = draw.randrange(5, 70)
        documents.append(list(range(first, first + length)))
        first += length
    assert first <= VOCAB_SIZE_OF_NUMBERS
    return documents


def random_documents(count: int, seed: int) -> list[list[int]]:
    """Documents of 5 to 69 tokens of the tokenizer."""
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(draw.randrange(5, 70))] for _ in range(count)]


def _source(subset: str, task: int) -> Slice:
    return Slice(file=f"{subset}/{task}.parquet", part=0, parts=1, bytes=1000)


def _write_split(directory: Path, subset: str, task: int, split: str, documents: Task) -> ShardRecord:
    prefix = directory / subset / f"{task:05d}.{split}"
    counts = write_shard(documents, prefix, VOCAB_SIZE_OF_NUMBERS, eod=1)
    numbers = range(len(documents))
    columns = {
        "file": pa.array([_source(subset, task).file for _ in numbers], pa.string()),
        "row": pa.array([3 * number for number in numbers], pa.int64()),
        # Every second task has no origins.
        "origin": pa.array(
            [f"https://{subset}/{number}" if task % 2 == 0 else None for number in numbers], pa.string()
        ),
    }
    pq.write_table(pa.table(columns), f"{prefix}.parquet")
    files = {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".parquet")}
    return ShardRecord(
        documents=counts.documents,
        tokens=counts.tokens,
        text_bytes=0,
        inner_eods=0,
        sha256={suffix: sha256(content).hexdigest() for suffix, content in files.items()},
        sizes={suffix: len(content) for suffix, content in files.items()},
    )


def _make_tokenizer(folder: Path) -> str:
    """A SentencePiece model of 300 tokens; returns its fingerprint."""
    folder.mkdir(parents=True)
    texts = [f"def function_{number}(value): return value + {number}\n" for number in range(50)]
    model = train_sentencepiece(texts, folder / "tokenizer", vocab_size=VOCAB_SIZE)
    fingerprint = sha256(model.read_bytes()).hexdigest()
    size = load_tokenizer(model).get_piece_size()
    assert size == VOCAB_SIZE
    facts = TokenizerFacts("SentencePieceTokenizer", fingerprint, vocab_size=size, eod=1, eod_token="</s>")
    write_json(folder / "facts.json", asdict(facts))
    return fingerprint
