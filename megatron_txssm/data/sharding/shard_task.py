"""One task of a corpus: rows -> (blobs) -> token ids -> .bin/.idx, with the sources of its documents and a manifest.

A task's files depend only on its slices, the tokenizer and the recipe: running it again, anywhere, gives the same
bytes. They get their final names when complete; the manifest, written last, marks the task as finished.
"""

import contextlib
import functools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_txssm.data.corpus.manifest import (
    SPLITS,
    ShardRecord,
    TaskManifest,
    is_held_out,
    manifest_path,
    read_manifest,
    read_plan,
    write_manifest,
)
from megatron_txssm.data.corpus.shard import ShardWriter
from megatron_txssm.data.sharding.broken_rows import BrokenRows
from megatron_txssm.data.sharding.fetch import with_texts
from megatron_txssm.data.sharding.readers import RowReader
from megatron_txssm.data.tokenizer.checked_encoder import CheckedEncoder
from megatron_txssm.data.tokenizer.encoder import Encoder, FastEncoder, load_encoders
from megatron_txssm.data.tokenizer.install import check_tokenizer
from megatron_txssm.errors import UserError
from megatron_txssm.files import file_sha256, partial_path, try_lock, write_json
from megatron_txssm.recipe.corpus.schema import CorpusRecipe
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts, read_tokenizer_facts

# Texts encoded at a time: enough for full speed, with little memory.
BATCH_BYTES = 2_000_000
BATCH_DOCUMENTS = 1024
# Sources of documents kept in memory until they are written as one row group.
SOURCES_PER_GROUP = 50_000
SECONDS_BETWEEN_STATUS = 1.0

_SOURCES = pa.schema([("file", pa.string()), ("row", pa.int64()), ("origin", pa.string())])


class ShardTask(PipelineStep):
    """The task of a rank, as a datatrove pipeline of one step: executors run it for every rank of a subset."""

    name = "Shards"
    type = "TOKENIZER"

    def __init__(self, recipe: CorpusRecipe, subset: str) -> None:
        super().__init__()
        self.recipe = recipe
        self.subset = subset

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Finish task `rank` unless it is already finished; yields no documents."""
        with _task_lock(self.recipe.path, self.subset, rank):
            if read_manifest(self.recipe.path, self.subset, rank) is None:
                manifest = _Task(self.recipe, self.subset, rank).run()
                for split, record in manifest.shards.items():
                    self.stat_update(f"{split} documents", value=record.documents)
                    self.stat_update(f"{split} tokens", value=record.tokens)
        return iter(())


class _Task:
    def __init__(self, recipe: CorpusRecipe, subset: str, task: int) -> None:
        self.recipe, self.subset, self.task = recipe, subset, task
        self.folder = recipe.path / subset
        self.source = recipe.subsets[subset]
        self.facts = read_tokenizer_facts(recipe.path)
        self.broken = BrokenRows(
            subset,
            max_broken_fraction=self.source.max_broken_fraction,
            max_broken_files=self.source.max_broken_files,
        )
        self.reader = RowReader(self.source, read_plan(recipe.path).tasks[subset][task], self.broken)
        self.status = _Status(self.folder / f"{task:05d}.status.json")

    def run(self) -> TaskManifest:
        for path in self.folder.glob(f"{self.task:05d}.*.partial"):
            path.unlink(missing_ok=True)
        splits = {split: _SplitWriter(self.folder / f"{self.task:05d}.{split}", self.facts) for split in SPLITS}
        try:
            encoder = CheckedEncoder(*_encoders(self.recipe.path, self.recipe.tokenizer.encoder))
            # Also closed on an error; otherwise the threads that fetch blobs would keep running.
            with contextlib.closing(with_texts(self.reader)) as documents:
                for batch in _batches(documents):
                    self._write(batch, splits, encoder)
                    self.status.update({**self._facts(splits), "encoder": encoder.name})
            self.broken.finish()
            for writer in splits.values():
                writer.publish()
            manifest = self._manifest(splits, encoder)
            write_manifest(self.recipe.path, manifest)
            self.status.remove()
            return manifest
        except OSError as error:
            self.status.fail(self._facts(splits), error)
            # The path shows which disk is full.
            where = error.filename or self.folder
            raise UserError(
                f"{self.subset} task {self.task}: {error.strerror or error} ({where}); "
                "finished tasks are kept: free disk space or correct the path, and run the same command again"
            ) from error
        except Exception as error:
            self.status.fail(self._facts(splits), error)
            raise
        finally:
            for writer in splits.values():
                writer.discard()

    def _write(self, batch: list[Document], splits: dict[str, "_SplitWriter"], encoder: CheckedEncoder) -> None:
        ids = encoder.encode(batch)
        held_out = [is_held_out(document.text, self.source.validation_fraction) for document in batch]
        for split, wanted in zip(SPLITS, (False, True), strict=True):
            chosen = [number for number, held in enumerate(held_out) if held == wanted]
            if chosen:
                splits[split].write([batch[number] for number in chosen], [ids[number] for number in chosen])

    def _facts(self, splits: dict[str, "_SplitWriter"]) -> Mapping[str, object]:
        return {
            "rows": self.broken.rows,
            "filtered": self.reader.filtered,
            "broken": sum(self.broken.counts.values()),
            "documents": sum(writer.shard.documents for writer in splits.values()),
            "tokens": sum(writer.shard.tokens for writer in splits.values()),
            "text_bytes": sum(writer.text_bytes for writer in splits.values()),
            "progress": round(self.reader.progress, 4),
        }

    def _manifest(self, splits: dict[str, "_SplitWriter"], encoder: CheckedEncoder) -> TaskManifest:
        return TaskManifest(
            subset=self.subset,
            task=self.task,
            sources=self.reader.pieces,
            rows=self.broken.rows,
            filtered=self.reader.filtered,
            broken=dict(sorted(self.broken.counts.items())),
            broken_places=tuple(self.broken.places),
            tokenizer=self.facts.fingerprint,
            encoder=encoder.name,
            compared_documents=encoder.compared,
            referred_documents=encoder.referred,
            differences=tuple(encoder.differences),
            shards={split: writer.record() for split, writer in splits.items() if writer.shard.documents},
        )


class _SplitWriter:
    """The shard of one split, and the sources of its documents."""

    def __init__(self, prefix: Path, facts: TokenizerFacts) -> None:
        self.shard = ShardWriter(prefix, facts.vocab_size, facts.eod)
        self.eod = facts.eod
        self.text_bytes = self.inner_eods = 0
        self.sources_path = Path(f"{prefix}.parquet")
        self._sources = pq.ParquetWriter(partial_path(self.sources_path), _SOURCES, compression="zstd")
        self._pending: list[dict[str, object]] = []

    def write(self, documents: list[Document], ids: list[np.ndarray]) -> None:
        joined = np.concatenate(ids)
        self.shard.write(joined, np.fromiter(map(len, ids), np.int64, len(ids)))
        self.inner_eods += int((joined == self.eod).sum())
        self.text_bytes += sum(len(document.text.encode()) for document in documents)
        self._pending += [document.metadata for document in documents]
        if len(self._pending) >= SOURCES_PER_GROUP:
            self._write_sources()

    def publish(self) -> None:
        """Give the files their final names; a split without documents has no files."""
        if not self.shard.documents:
            self.discard()
            for path in (self.shard.bin_path, self.shard.idx_path, self.sources_path):
                path.unlink(missing_ok=True)
            return
        self._write_sources()
        self._sources.close()
        partial_path(self.sources_path).replace(self.sources_path)
        self.shard.publish()

    def record(self) -> ShardRecord:
        paths = {".bin": self.shard.bin_path, ".idx": self.shard.idx_path, ".parquet": self.sources_path}
        return ShardRecord(
            documents=self.shard.documents,
            tokens=self.shard.tokens,
            text_bytes=self.text_bytes,
            inner_eods=self.inner_eods,
            sha256=self.shard.sha256 | {".parquet": file_sha256(self.sources_path)},
            sizes={suffix: path.stat().st_size for suffix, path in paths.items()},
        )

    def discard(self) -> None:
        self.shard.discard()
        with contextlib.suppress(OSError):
            self._sources.close()
        partial_path(self.sources_path).unlink(missing_ok=True)

    def _write_sources(self) -> None:
        self._sources.write_table(pa.Table.from_pylist(self._pending, schema=_SOURCES))
        self._pending.clear()


class _Status:
    """A file with the progress of a running task, or the error of a failed one, for `txssm data status` anywhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.time()
        self._next = 0.0

    def update(self, facts: Mapping[str, object]) -> None:
        if time.monotonic() >= self._next:
            self._write({**facts, "state": "running"})
            self._next = time.monotonic() + SECONDS_BETWEEN_STATUS

    def fail(self, facts: Mapping[str, object], error: BaseException) -> None:
        # On a full disk this may fail, too; the original error matters more.
        with contextlib.suppress(OSError):
            self._write({**facts, "state": "failed", "error": f"{type(error).__name__}: {error}"})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _write(self, facts: Mapping[str, object]) -> None:
        place = {"host": socket.gethostname(), "pid": os.getpid(), "started": self.started, "updated": time.time()}
        write_json(self.path, {**facts, **place})


@contextlib.contextmanager
def _task_lock(directory: Path, subset: str, task: int) -> Iterator[None]:
    """Lock a task while it runs: two jobs would mix its files. The system frees the lock when the process ends."""
    path = manifest_path(directory, subset, task).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        # Without locks in the file system, the user must ensure that no task runs twice at a time.
        if not try_lock(stream.fileno()):
            raise UserError(f"{subset} task {task} of {directory} is being run by another process ({path})")
        yield
        path.unlink(missing_ok=True)


@functools.lru_cache(maxsize=1)
def _encoders(directory: Path, choice: str) -> tuple[FastEncoder | None, Encoder]:
    """(fast encoder or None, reference), loaded once per process; UserError if the corpus's tokenizer was changed."""
    return load_encoders(directory / "tokenizer", check_tokenizer(directory), choice)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches of documents with about BATCH_BYTES of text."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
