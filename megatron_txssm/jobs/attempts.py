"""The files of a run folder, and the records of a run's attempts.

RUN/recipe.yaml                   the resolved recipe, its paths independent of the current folder (settings/paths.py)
RUN/submission.json               the last submission: command, commit, nodes, job numbers
RUN/pretrain.sbatch, …            the batch scripts
RUN/logs/pretrain-17.out, …       output of job 17
RUN/logs/rank_3.log               output of rank 3
RUN/metrics.jsonl                 one line per step; its growth shows that the run is alive
RUN/running.json                  the process that trains there now (run_lock.py)
RUN/ended.json                    how a run without Slurm ended (ended.py)
RUN/conversions.jsonl             one line per folder that `txssm convert export` made of it
RUN/evaluation/history.jsonl      one line per `txssm eval loss`
RUN/evaluation/harness/           a folder per `txssm eval harness`, and its line in history.jsonl
RUN/attempts/0002/                the second start of the trainer: restarted, requeued or submitted again
  attempt.json                    nodes, first and last step, how it ended
  preflight.json                  the nodes' reports
  rank_3.json                     the exception that ended rank 3, as torch's error handler records it
  stopped                         exists if the ranks were told to stop and saved
"""

import dataclasses
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from megatron_txssm.errors import UserError, nearest, shown
from megatron_txssm.files import write_json
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.limits import Phase
from megatron_txssm.metrics import last_step
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.submission import read_submission
from megatron_txssm.training.launch.preflight import saved_step
from megatron_txssm.typed_json import is_date, read_json, typed_fields

# A node's name, as Slurm has it.
_NODE = re.compile(r"[\w.-]+")


class Hang(TypedDict):
    """A hang of the trainer."""

    # Since metrics.jsonl last grew.
    seconds: float
    # Ranks that wrote no stacks; None if they could not be asked, since slurmctld was down.
    silent_ranks: list[int] | None
    # Missing in records of earlier versions.
    during: NotRequired[Phase]


@dataclass
class Attempt:
    """One start of the trainer; saved as attempt.json when it begins, and when it ends unless the supervisor is killed.

    Fields that other versions do not write have a default.
    """

    folder: Path
    job_id: str
    nodes: list[str]
    nproc_per_node: int
    # Seconds since the epoch.
    started: float
    # At the start: the newest checkpoint's step (None without one), and the highest step of all earlier attempts.
    saved_before: int | None = None
    done_before: int = 0
    # Bytes of metrics.jsonl at the start.
    metrics_offset: int = 0
    # The job's output file (None if it is not a regular file), and its bytes at the start.
    output: str | None = None
    output_offset: int = 0
    ended: float | None = None
    # srun's; None if it was not started or did not end.
    exit_code: int | None = None
    # Slurm told the batch script to stop (SIGTERM): preempted, cancelled, or out of time.
    told_to_stop: bool = False
    hang: Hang | None = None
    # Nodes that failed the preflight -> their problems.
    failed_nodes: dict[str, list[str]] = field(default_factory=dict)
    # At the end: the highest step in metrics.jsonl, and the newest checkpoint's.
    last_step: int | None = None
    saved_after: int | None = None
    # Why it ended: see diagnosis.Diagnosis. None until known, text if only a later version knows the cause.
    cause: Cause | str | None = None
    detail: str = ""
    rank: int | None = None
    node: str | None = None
    # What the supervisor did about it.
    action: str = ""

    def __post_init__(self) -> None:
        if self.cause is not None:
            self.cause = Cause.read(self.cause)

    @property
    def number(self) -> int:
        return int(self.folder.name)

    @property
    def run(self) -> Path:
        return self.folder.parent.parent

    @property
    def came_further(self) -> bool:
        """Whether it did a step that no earlier attempt had done, or saved a later checkpoint."""
        return (self.last_step or 0) > self.done_before or (self.saved_after or 0) > (self.saved_before or 0)

    def node_of(self, rank: int) -> str:
        """The node of a rank: ranks are assigned to nodes in contiguous blocks."""
        return self.nodes[min(rank // self.nproc_per_node, len(self.nodes) - 1)]

    def read_output(self, end: int | None = None) -> str:
        """The job's output since the attempt began, at most the last 4 MB; `end`: up to this byte of the file."""
        # Path.is_file would raise for a name that is too long.
        if self.output is None or not os.path.isfile(self.output):
            return ""
        with open(self.output, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = size if end is None else min(end, size)
            begin = file.seek(max(self.output_offset, end - 4_000_000))
            return file.read(max(0, end - begin)).decode(errors="replace")

    def skip_output(self) -> None:
        """Exclude the job's output so far: it is the preflight's, not the trainer's."""
        if self.output is not None and Path(self.output).is_file():
            self.output_offset = Path(self.output).stat().st_size

    def save(self) -> None:
        fields = dataclasses.asdict(self)
        del fields["folder"]
        write_json(self.folder / "attempt.json", fields)


def new_attempt(recipe: Recipe, job_id: str, nodes: list[str], nproc_per_node: int) -> Attempt:
    """Begin an attempt in its own folder; its output is this process's stdout."""
    before = attempts(recipe.run_path)
    folder = _new_folder(recipe.run_path.resolve() / "attempts", max((old.number for old in before), default=0) + 1)
    metrics = recipe.run_path / "metrics.jsonl"
    # A terminal or a pipe cannot be read again.
    output = Path(os.path.realpath("/proc/self/fd/1"))
    attempt = Attempt(
        folder=folder,
        job_id=job_id,
        nodes=nodes,
        nproc_per_node=nproc_per_node,
        started=time.time(),
        saved_before=saved_step(recipe.checkpoint_path),
        done_before=farthest_step(metrics, before[-1] if before else None) or 0,
        metrics_offset=metrics.stat().st_size if metrics.exists() else 0,
        output=str(output) if output.is_file() else None,
        output_offset=output.stat().st_size if output.is_file() else 0,
    )
    attempt.save()
    return attempt


def _new_folder(attempts: Path, number: int) -> Path:
    """Create the first free folder from `number` on: two jobs may begin at once; a kill may leave an empty folder."""
    attempts.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            (folder := attempts / f"{number:04d}").mkdir()
            return folder
        except FileExistsError:
            number += 1


def attempts(run: Path) -> list[Attempt]:
    """All attempts of a run, in order; fields unknown to this version are ignored."""
    found: list[Attempt] = []
    # Path.glob would raise for a name that is too long.
    if not os.path.isdir(run):
        return found
    # Renamed folders, such as 0002.kept, do not count.
    paths = [path for path in run.glob("attempts/*/attempt.json") if path.parent.name.isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.parent.name)):
        try:
            found.append(Attempt(folder=path.parent, **_fields(read_json(path))))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not readable ({error}); remove its folder to continue without it") from error
    return found


def _fields(record: object) -> dict[str, Any]:
    """The fields of an attempt in its record; ValueError for values that no supervisor writes."""
    # The folder is where the record lies, whatever it says.
    known = {name: value for name, value in record.items() if name != "folder"} if isinstance(record, dict) else record
    fields = typed_fields(known, Attempt)
    nodes, processes = fields.get("nodes", ["n"]), fields.get("nproc_per_node", 1)
    if not nodes or not all(map(_NODE.fullmatch, nodes)) or processes < 1:
        raise ValueError(f"it has nodes={nodes}, nproc_per_node={processes}")
    if not all(is_date(fields.get(name) or 0) for name in ("started", "ended")):
        raise ValueError(f"it has started={fields.get('started')}, ended={fields.get('ended')}")
    if any(fields.get(name, 0) < 0 for name in ("metrics_offset", "output_offset")):
        raise ValueError("it has a negative number of bytes")
    return fields


def farthest_step(metrics: Path, attempt: Attempt | None) -> int | None:
    """The highest step in metrics.jsonl, over all attempts up to `attempt`, the last; None without one.

    Only lines written since that attempt began are read: its record holds the highest step before.
    """
    if attempt is None or not metrics.exists() or metrics.stat().st_size < attempt.metrics_offset:
        # Without a record, or with a metrics.jsonl started afresh, only the file counts.
        return last_step(metrics)
    return max(attempt.done_before, last_step(metrics, attempt.metrics_offset) or 0) or None


def find_run(run: str | Path) -> Path:
    """A run's folder from its path, its name under runs/, or the number of one of its jobs.

    The folder of a submitted evaluation, too: it has a submission.json, but no recipe.yaml.
    """
    text = str(run)
    for path in (Path(text), Path("runs") / text):
        # Path.is_file would raise for a name that is too long.
        if os.path.isfile(path / "recipe.yaml") or os.path.isfile(path / "submission.json"):
            return path
    if text.isdecimal():
        runs = Path("runs")
        for path in sorted([*runs.glob("*/submission.json"), *runs.glob("*/evaluation/harness/submission.json")]):
            if text in job_ids(path.parent):
                return path.parent
        for job in _queue(text):
            if job.job_id == text and (job.script.parent / "submission.json").is_file():
                return job.script.parent
    known = sorted(path.parent.name for path in Path("runs").glob("*/recipe.yaml"))
    raise UserError(
        f"{shown(text)} is not a run: no such folder with a recipe.yaml, here or in runs/, and no job with this number"
        f"{nearest(Path(text).name, known) or (f'; runs/ has {", ".join(known[:20])}' if known else '')}"
    )


def _queue(job: str) -> list[slurm.Job]:
    try:
        return slurm.queue()
    except slurm.NoAnswer as error:
        raise UserError(f"no run here was submitted as job {job}; name the run's folder ({error})") from None


def job_ids(run: Path, but: str = "") -> list[str]:
    """Job numbers of the run's last submission, except those of the stage `but`; a job array has one number."""
    jobs = read_submission(run).get("jobs", {})
    return [job_id for stage, of_stage in jobs.items() if stage != but for job_id in of_stage]


def load_run(run: Path) -> Recipe:
    """The recipe in a run folder, pointing to this folder even if it was written for another.

    Earlier versions stored paths relative to the folder in which the run was submitted.
    """
    recipe, folder = load_recipe(run / "recipe.yaml"), run.resolve()
    if folder.is_relative_to(recipe.run_path.resolve()):
        return recipe
    checkpoint, begin = recipe.checkpoint, read_submission(run).get("directory", "")
    if checkpoint.directory and not os.path.isabs(checkpoint.directory):
        checkpoint = dataclasses.replace(checkpoint, directory=os.path.join(begin, checkpoint.directory))
    return dataclasses.replace(recipe, run_directory=str(folder), checkpoint=checkpoint)
