"""Checks a corpus against its manifests, byte by byte, and with the reader that training uses."""

import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.data.corpus.manifest import (
    SHARD_SUFFIXES,
    SPLITS,
    UNREACHABLE_BLOB,
    Plan,
    ShardRecord,
    TaskManifest,
    corpus_directory,
    read_manifest,
    read_plan,
    remove_task,
    write_subset_manifest,
)
from megatron_txssm.data.corpus.shard import check_shard
from megatron_txssm.data.tokenizer.install import check_tokenizer
from megatron_txssm.errors import UserError
from megatron_txssm.files import file_sha256
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts


@dataclass(frozen=True)
class Fault:
    """A fault of a task, which must be redone."""

    subset: str
    task: int
    what: str


def verify_corpus(corpus: str | Path, *, redo: bool = False) -> int:
    """Check every task of a corpus and print the faults; returns 0 if there are none, otherwise 1.

    corpus: a directory, or the name of its recipe. redo: remove faulty tasks, so that sharding makes them again.
    """
    directory = corpus_directory(corpus)
    facts, tasks = check_tokenizer(directory), tasks_of(directory)
    faults, unreachable = [], 0
    for subset, task in _with_progress_bar(tasks):
        if fault := check_task(directory, subset, task, facts):
            faults.append(fault)
            print(f"{fault.subset} task {fault.task}: {fault.what}")
        elif manifest := read_manifest(directory, subset, task):
            unreachable += manifest.broken.get(UNREACHABLE_BLOB, 0)
    if unreachable:
        print(f"{unreachable:,} texts could not be fetched; to try again, delete the manifests that count them")
    if not faults:
        for subset in dict.fromkeys(subset for subset, _ in tasks):
            write_subset_manifest(directory, subset)
        print(f"{directory}: all {len(tasks):,} tasks match their manifests")
        return 0
    if redo:
        for fault in faults:
            remove_task(directory, fault.subset, fault.task)
    remedy = f"txssm data shard {directory}"
    removed = "they were removed; redo them" if redo else "remove them with --redo, then redo them"
    print(f"{len(faults):,} of {len(tasks):,} tasks failed verification; {removed}: {remedy}")
    return 1


def _with_progress_bar(tasks: list[tuple[str, int]]) -> Iterable[tuple[str, int]]:
    from rich.progress import track

    return track(tasks, "verifying", transient=True, disable=not sys.stdout.isatty())


def tasks_of(directory: Path) -> list[tuple[str, int]]:
    """Every (subset, task) of a corpus."""
    return [(subset, task) for subset, tasks in read_plan(directory).tasks.items() for task in range(len(tasks))]


def check_task(
    directory: Path, subset: str, task: int, facts: TokenizerFacts, *, through_megatron: bool = True
) -> Fault | None:
    """The first fault of a task, None without a fault. Reads all its bytes.

    through_megatron: also read it with Megatron's IndexedDataset, whose import takes seconds.
    """
    try:
        manifest = read_manifest(directory, subset, task)
        if manifest is None:
            return Fault(subset, task, "is not finished")
        for what in _faults(directory, read_plan(directory), manifest, facts, through_megatron):
            return Fault(subset, task, what)
    except (UserError, OSError) as error:
        return Fault(subset, task, str(error))
    return None


def remove_faulty_tasks(directory: Path) -> None:
    """Remove tasks that do not match their manifests, without Megatron's reader; no effect without a plan."""
    if (directory / "plan.json").exists():
        facts = check_tokenizer(directory)
        for subset, task in tasks_of(directory):
            if check_task(directory, subset, task, facts, through_megatron=False):
                remove_task(directory, subset, task)


def _faults(
    directory: Path, plan: Plan, manifest: TaskManifest, facts: TokenizerFacts, through_megatron: bool
) -> Iterator[str]:
    if manifest.sources != plan.tasks[manifest.subset][manifest.task]:
        yield "its manifest names other sources than the plan"
    if manifest.tokenizer != facts.fingerprint:
        yield f"was tokenised by another tokenizer ({manifest.tokenizer})"
    for split in SPLITS:
        prefix = directory / manifest.subset / f"{manifest.task:05d}.{split}"
        if split in manifest.shards:
            yield from _shard_faults(prefix, manifest.shards[split])
            if through_megatron:
                yield from _megatron_faults(prefix, manifest.shards[split], facts)
        elif Path(f"{prefix}.bin").exists():
            yield f"{prefix}.bin belongs to no manifest"


def _shard_faults(prefix: Path, record: ShardRecord) -> Iterator[str]:
    for suffix in SHARD_SUFFIXES:
        path = Path(f"{prefix}{suffix}")
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != record.sizes.get(suffix):
            yield f"{path} has {path.stat().st_size} bytes, its manifest says {record.sizes.get(suffix)}"
        elif file_sha256(path) != record.sha256.get(suffix):
            yield f"{path} has changed since it was written (SHA-256)"
    counts = check_shard(prefix)
    if (counts.documents, counts.tokens) != (record.documents, record.tokens):
        yield f"{prefix} holds {counts.documents} documents and {counts.tokens} tokens, its manifest says otherwise"
    sources = _rows(Path(f"{prefix}.parquet"))
    if sources != record.documents:
        yield f"{prefix}.parquet names the sources of {sources} documents, there are {record.documents}"


def _megatron_faults(prefix: Path, record: ShardRecord, facts: TokenizerFacts) -> Iterator[str]:
    """The faults that Megatron's own reader reveals."""
    import numpy as np

    dataset = _megatron_reader()(str(prefix))
    if len(dataset) != record.documents or len(dataset.document_indices) != record.documents + 1:
        yield f"Megatron reads {len(dataset)} documents from {prefix}, its manifest says {record.documents}"
        return
    tokens = np.memmap(f"{prefix}.bin", mode="r", dtype=dataset.index.dtype)
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)
    if (tokens[ends - 1] != facts.eod).any():
        first = int(np.argmax(tokens[ends - 1] != facts.eod))
        yield f"document {first} of {prefix} does not end with the end-of-document token {facts.eod}"
    # In portions: comparing a whole shard at once would need memory for all of it.
    portions = [tokens[start : start + 2**24] for start in range(0, len(tokens), 2**24)]
    eods = sum(int((portion == facts.eod).sum()) for portion in portions)
    if eods != record.documents + record.inner_eods:
        yield f"{prefix} holds {eods} end-of-document tokens, its manifest says {record.documents + record.inner_eods}"
    largest = max(int(portion.max()) for portion in portions)
    if largest >= facts.vocab_size:
        yield f"{prefix} holds token {largest}, outside the vocabulary of {facts.vocab_size}"


@functools.cache
def _megatron_reader() -> type:
    import logging
    import warnings

    from megatron_txssm.platform import prepare_platform

    # Megatron's six log lines per shard and its warnings on machines without a GPU would bury the faults.
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    with warnings.catch_warnings(action="ignore"):
        prepare_platform()
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows
