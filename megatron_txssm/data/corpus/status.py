"""The progress of a corpus, read from its files, on any machine that sees the folder."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from megatron_txssm.data.corpus.manifest import Plan, TaskManifest, add_counts, read_manifest, read_plan

if TYPE_CHECKING:
    from megatron_txssm.data.tokenizer.checked_encoder import Difference

# A running task writes its status every second; after this long without one, it was killed or its node lost.
SILENT_SECONDS = 120.0


class RunningTask(TypedDict):
    """The status file of a running task: what it has done so far."""

    state: Literal["running"]
    # Seconds since the epoch.
    updated: float
    # Share of its source bytes.
    progress: float
    encoder: str
    rows: int
    filtered: int
    documents: int
    tokens: int
    text_bytes: int


class FailedTask(TypedDict):
    """The status file of a failed task."""

    state: Literal["failed"]
    error: str


@dataclass
class SubsetStatus:
    """Sums over the tasks of a subset."""

    name: str
    tasks: int
    finished: int = 0
    running: int = 0
    # Tasks whose last status is older than SILENT_SECONDS.
    lost: int = 0
    # Task -> its error.
    failed: dict[int, str] = field(default_factory=dict)
    # Share of the source bytes read so far, running tasks included.
    progress: float = 0.0
    rows: int = 0
    # Rows excluded by the recipe's filters.
    filtered: int = 0
    documents: int = 0
    # Those of them in the validation shards of finished tasks.
    held_out: int = 0
    tokens: int = 0
    # UTF-8 bytes of the tokenised texts.
    text_bytes: int = 0
    broken: dict[str, int] = field(default_factory=dict)
    # Libraries that made the tokens: name, version, and the reason if it was not gigatoken.
    encoders: set[str] = field(default_factory=set)
    # Documents with characters on which gigatoken and the reference may differ: encoded by the reference.
    referred: int = 0
    # (task, an unforeseen difference between the two), of finished tasks.
    differences: list[tuple[int, "Difference"]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.finished == self.tasks


class CorpusStatus:
    """Reads a corpus directory repeatedly, and each finished task's manifest once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plan: Plan = read_plan(directory)
        self._manifests: dict[tuple[str, int], TaskManifest] = {}

    def read(self) -> list[SubsetStatus]:
        return [self._subset(name) for name in self.plan.tasks]

    def _subset(self, name: str) -> SubsetStatus:
        tasks = self.plan.tasks[name]
        status = SubsetStatus(name, len(tasks))
        # Some sources do not report file sizes.
        sizes = [max(1, self.plan.bytes(name, task)) for task in range(len(tasks))]
        all_bytes = sum(sizes)
        running = self._running(name)
        for task in range(len(tasks)):
            weight = sizes[task] / all_bytes
            manifest = self._manifest(name, task)
            if manifest is not None:
                self._add_finished(status, manifest)
                status.progress += weight
            elif facts := running.get(task):
                self._add_running(status, task, facts, weight)
        return status

    def _manifest(self, name: str, task: int) -> TaskManifest | None:
        if (name, task) not in self._manifests:
            manifest = read_manifest(self.directory, name, task)
            if manifest is None:
                return None
            self._manifests[name, task] = manifest
        return self._manifests[name, task]

    def _running(self, name: str) -> dict[int, RunningTask | FailedTask]:
        found: dict[int, RunningTask | FailedTask] = {}
        for path in (self.directory / name).glob("*.status.json"):
            try:
                found[int(path.name.split(".")[0])] = json.loads(path.read_bytes())
            except (OSError, ValueError):
                # The task has just finished.
                continue
        return found

    def _add_finished(self, status: SubsetStatus, manifest: TaskManifest) -> None:
        status.finished += 1
        status.rows += manifest.rows
        status.encoders.add(manifest.encoder)
        status.referred += manifest.referred_documents
        status.filtered += manifest.filtered
        status.differences += [(manifest.task, found) for found in manifest.differences]
        status.broken = add_counts([status.broken, manifest.broken])
        for split, record in manifest.shards.items():
            status.documents += record.documents
            status.held_out += record.documents if split == "validation" else 0
            status.tokens += record.tokens
            status.text_bytes += record.text_bytes

    def _add_running(self, status: SubsetStatus, task: int, facts: RunningTask | FailedTask, weight: float) -> None:
        if facts["state"] == "failed":
            status.failed[task] = facts["error"]
        elif time.time() - facts["updated"] > SILENT_SECONDS:
            status.lost += 1
        else:
            status.running += 1
            status.progress += weight * facts["progress"]
            status.encoders.add(facts["encoder"])
            for name in ("rows", "filtered", "documents", "tokens", "text_bytes"):
                setattr(status, name, getattr(status, name) + facts[name])
