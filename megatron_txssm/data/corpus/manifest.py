"""The files of a corpus directory: its tokenizer, the tasks of each subset, and a manifest for each finished task.

    DIRECTORY/corpus.yaml                    the corpus recipe that made it
    DIRECTORY/plan.json                      its tasks: the slices of source files that each one reads
    DIRECTORY/tokenizer/                     the tokenizer that Megatron loads, and tokenizer/facts.json
    DIRECTORY/SUBSET/00012.train.bin .idx    tokens of task 12 (prefix SUBSET/00012.train), likewise 00012.validation
    DIRECTORY/SUBSET/00012.train.parquet     the source of each of its documents, in order
    DIRECTORY/SUBSET/00012.json              the task's manifest, written last: it marks the task as finished
    DIRECTORY/SUBSET/manifest.json           sums over the subset's tasks, once all are finished

No file contains an absolute path, so a corpus may be moved.
"""

import dataclasses
import functools
import json
import os
import shlex
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from megatron_txssm.errors import UserError
from megatron_txssm.files import write_json
from megatron_txssm.recipe.corpus.loader import how_to_make, load_corpus_recipe
from megatron_txssm.recipe.corpus.tokenizer import NoCorpus, TokenizerFacts, read_tokenizer_facts

if TYPE_CHECKING:
    from megatron_txssm.data.tokenizer.checked_encoder import Difference

# The parts of a corpus: documents to train on, and documents held out.
SPLITS = ("train", "validation")
# The files of one shard: tokens, index, sources of the documents.
SHARD_SUFFIXES = (".bin", ".idx", ".parquet")
# Raise it when the same sources and recipe would no longer give the same files.
FORMAT = 1
# The one reason in TaskManifest.broken that may be temporary: the text could not be fetched.
UNREACHABLE_BLOB = "unreachable blob"


@dataclass(frozen=True)
class Slice:
    """Part of a source file: its rows from part/parts to (part+1)/parts of all."""

    # Relative to the subset's source.
    file: str
    part: int
    parts: int
    # Bytes of the source file in this slice, compressed if the file is.
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The tasks of every subset, in order; a task's number is its index."""

    tasks: dict[str, tuple[tuple[Slice, ...], ...]]

    def bytes(self, subset: str, task: int) -> int:
        """Source bytes of a task."""
        return sum(piece.bytes for piece in self.tasks[subset][task])


@dataclass(frozen=True)
class ShardRecord:
    """One .bin/.idx pair and the sources of its documents."""

    documents: int
    # End-of-document tokens included.
    tokens: int
    # UTF-8 bytes of the texts.
    text_bytes: int
    # End-of-document tokens within texts, besides the one that ends every document.
    inner_eods: int
    sha256: dict[str, str]
    # By suffix: .bin, .idx, .parquet.
    sizes: dict[str, int]


class BrokenPlace(TypedDict):
    """A row, or a file (row None), that could not be used."""

    file: str
    row: int | None
    reason: str
    detail: str


@dataclass(frozen=True)
class TaskManifest:
    """The output of a finished task, and its sources."""

    subset: str
    task: int
    sources: tuple[Slice, ...]
    # Rows read, of which `filtered` were excluded by filters and `broken` could not be used.
    rows: int
    filtered: int
    # Reason -> number of rows, or of files that could not be read to the end.
    broken: dict[str, int]
    # The first broken ones.
    broken_places: tuple[BrokenPlace, ...]
    tokenizer: str
    # Library that made the tokens, and number of documents compared with the reference tokenizer.
    encoder: str
    compared_documents: int
    shards: dict[str, ShardRecord]
    # Documents encoded by the reference alone, for characters on which the two may differ.
    referred_documents: int = 0
    # Found by comparison.
    differences: tuple["Difference", ...] = ()
    format: int = FORMAT


@dataclass(frozen=True)
class Subset:
    """A finished subset."""

    directory: Path
    name: str
    manifests: tuple[TaskManifest, ...]

    def shards(self, split: str) -> list[tuple[str, ShardRecord]]:
        """(path prefix, record) of every shard of a split, in the order of the tasks."""
        return [
            (str(self.directory / self.name / f"{m.task:05d}.{split}"), m.shards[split])
            for m in self.manifests
            if split in m.shards
        ]

    def tokens(self, split: str) -> int:
        return sum(record.tokens for _, record in self.shards(split))

    def documents(self, split: str) -> int:
        return sum(record.documents for _, record in self.shards(split))


@dataclass(frozen=True)
class Corpus:
    """A corpus; all tasks of its `subsets` are finished."""

    directory: Path
    tokenizer: TokenizerFacts
    subsets: dict[str, Subset]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation: decided by a hash of its text, so that equal texts get the same answer.

    Of two subsets with different fractions, the larger holds out every text that the smaller does.
    """
    return zlib.crc32(text.encode()) < fraction * 2**32


def open_corpus(directory: str | Path, used: Collection[str] | None = None) -> Corpus:
    """The corpus in a directory; NoCorpus, with the remaining work, if it is missing or unfinished.

    used: the subsets to open, None for all; others may be unfinished, and are left out.
    """
    directory = Path(directory)
    plan, facts = read_plan(directory), read_tokenizer_facts(directory)
    subsets = {}
    for name, tasks in plan.tasks.items():
        if used is not None and name not in used:
            continue
        manifests = tuple(read_manifest(directory, name, task) for task in range(len(tasks)))
        finished = tuple(manifest for manifest in manifests if manifest is not None)
        if len(finished) < len(tasks):
            raise NoCorpus(
                f"{directory}: {len(tasks) - len(finished)} of the {len(tasks)} tasks of {name} are not finished; "
                f"finish them with `txssm data shard {directory}/corpus.yaml`"
            )
        subsets[name] = Subset(directory, name, finished)
    return Corpus(directory, facts, subsets)


def corpus_directory(name: str | Path) -> Path:
    """The directory of a corpus recipe or a corpus, by name or path; NoCorpus if it holds no corpus."""
    # Path.exists would raise for a name that is too long.
    if os.path.exists(Path(name) / "plan.json"):
        return Path(name)
    directory = load_corpus_recipe(name).path
    if not (directory / "plan.json").exists():
        raise NoCorpus(
            f"{directory} holds no corpus (no plan.json); make it: txssm data shard {shlex.quote(str(name))}"
        )
    return directory


def logging_folder(directory: Path, subset: str) -> Path:
    """datatrove's folder for its logs and its own marks of finished tasks."""
    return directory / "logs" / subset


def manifest_path(directory: Path, subset: str, task: int) -> Path:
    return directory / subset / f"{task:05d}.json"


def read_manifest(directory: Path, subset: str, task: int) -> TaskManifest | None:
    """A task's manifest, None if the task is unfinished; UserError if it is not a manifest of this version."""
    path = manifest_path(directory, subset, task)
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT:
            raise UserError(f"{path}: format {data['format']}, this version reads {FORMAT}; shard the corpus again")
        data["sources"] = tuple(Slice(**piece) for piece in data["sources"])
        data["broken_places"] = tuple(data["broken_places"])
        data["differences"] = tuple(data.get("differences", ()))
        data["shards"] = {split: ShardRecord(**record) for split, record in data["shards"].items()}
        if (data["subset"], data["task"]) != (subset, task):
            raise ValueError(f"it belongs to {data['subset']} task {data['task']}")
        return TaskManifest(**data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a task's manifest ({error}); delete it and shard again") from None


def write_manifest(directory: Path, manifest: TaskManifest) -> None:
    """Finish a task, and its subset if it was the last one."""
    write_json(manifest_path(directory, manifest.subset, manifest.task), dataclasses.asdict(manifest))
    write_subset_manifest(directory, manifest.subset)


def write_subset_manifest(directory: Path, subset: str) -> None:
    """Write the sums of a subset if all its tasks are finished; two processes at once write the same bytes."""
    tasks = len(read_plan(directory).tasks[subset])
    if not all(manifest_path(directory, subset, task).exists() for task in range(tasks)):
        return
    manifests = [manifest for task in range(tasks) if (manifest := read_manifest(directory, subset, task))]
    if len(manifests) < tasks:
        return
    totals: dict[str, object] = {"subset": subset, "tasks": tasks, "tokenizer": manifests[0].tokenizer}
    totals |= {name: sum(getattr(m, name) for m in manifests) for name in ("rows", "filtered")}
    totals["broken"] = add_counts(m.broken for m in manifests)
    for split in SPLITS:
        records = [m.shards[split] for m in manifests if split in m.shards]
        totals[split] = {
            name: sum(getattr(record, name) for record in records)
            for name in ("documents", "tokens", "text_bytes", "inner_eods")
        } | {"shards": len(records)}
    write_json(directory / subset / "manifest.json", totals)


def remove_task(directory: Path, subset: str, task: int) -> None:
    """Remove a finished task, its manifests first, so that `txssm data shard` makes it again."""
    manifest_path(directory, subset, task).unlink(missing_ok=True)
    (directory / subset / "manifest.json").unlink(missing_ok=True)
    for path in (directory / subset).glob(f"{task:05d}.*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def add_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of mappings from names to numbers."""
    total: dict[str, int] = {}
    for count in counts:
        for name, number in count.items():
            total[name] = total.get(name, 0) + number
    return dict(sorted(total.items()))


def read_plan(directory: str | Path) -> Plan:
    """The plan of a corpus directory; NoCorpus if there is none."""
    path = Path(directory) / "plan.json"
    try:
        # Cached by modification time, since every task reads it at its beginning and at its end.
        return _read_plan(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise NoCorpus(f"{directory} holds no corpus (no plan.json); {how_to_make(directory)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a plan ({error}); delete it and shard again") from None


@functools.lru_cache(maxsize=4)
def _read_plan(path: Path, _: int) -> Plan:
    tasks = json.loads(path.read_bytes())["tasks"]
    return Plan({name: tuple(tuple(Slice(*piece) for piece in task) for task in rows) for name, rows in tasks.items()})


def write_plan(directory: Path, plan: Plan) -> None:
    rows = {name: [[dataclasses.astuple(p) for p in task] for task in tasks] for name, tasks in plan.tasks.items()}
    write_json(directory / "plan.json", {"format": FORMAT, "tasks": rows}, indent=None)
