"""What a run folder holds, above all of its Slurm jobs.

RUN/recipe.yaml                   the resolved recipe, its paths independent of the current folder (recipe/paths.py)
RUN/submission.json               how it was submitted last: command, commit, layout, job numbers
RUN/pretrain.sbatch, …            the batch scripts
RUN/logs/pretrain-17.out, …       what job 17 printed
RUN/logs/rank_3.log               what rank 3 printed
RUN/metrics.jsonl                 one line per step: also the run's sign of life
RUN/running.json                  who trains there now (training/launch/run_lock.py)
RUN/ended.json                    how a run without Slurm ended (training/launch/ended.py)
RUN/attempts/0002/                the second start of the trainer, requeued or submitted again
  attempt.json                    nodes, first and last step, how it ended
  preflight.json                  what each node reported
  rank_3.json                     the exception that ended rank 3, as torch's error handler records it
  stopped                         there where the ranks were told to stop, and saved
"""

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

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


class Hang(TypedDict):
    """Where the trainer hung, and which ranks."""

    # Since its last step.
    seconds: float
    # Those that wrote no stacks; None where nobody was asked, as slurmctld was away.
    silent_ranks: list[int] | None
    # Earlier versions do not say.
    during: NotRequired[Phase]


@dataclass
class Attempt:
    """One start of the trainer; saved as attempt.json at its begin, and again at its end unless it was killed.

    What other versions do not write has a default.
    """

    folder: Path
    job_id: str
    nodes: list[str]
    nproc_per_node: int
    # Seconds since the epoch.
    started: float
    # Newest checkpoint's step at the start, None without one, and the farthest step that any attempt had done.
    saved_before: int | None = None
    done_before: int = 0
    # Bytes of metrics.jsonl at the start.
    metrics_offset: int = 0
    # The job's output file, None where it has none, and its bytes at the start.
    output: str | None = None
    output_offset: int = 0
    ended: float | None = None
    # srun's; None where it was not started, or did not end.
    exit_code: int | None = None
    # Slurm told the batch script to stop (SIGTERM): preempted, cancelled, or out of time.
    told_to_stop: bool = False
    hang: Hang | None = None
    # Node -> its problems, of those that failed the preflight.
    failed_nodes: dict[str, list[str]] = field(default_factory=dict)
    # Of all that is in metrics.jsonl and among the checkpoints at the end.
    last_step: int | None = None
    saved_after: int | None = None
    # Why it ended: see diagnosis.Diagnosis. None as long as nobody could say, text where a later version said it.
    cause: Cause | str | None = None
    detail: str = ""
    rank: int | None = None
    node: str | None = None
    # What was done about it.
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
        """It did a step that none had done before it, or saved a later one."""
        return (self.last_step or 0) > self.done_before or (self.saved_after or 0) > (self.saved_before or 0)

    def node_of(self, rank: int) -> str:
        """Ranks are dealt out in blocks."""
        return self.nodes[min(rank // self.nproc_per_node, len(self.nodes) - 1)]

    def read_output(self) -> str:
        """What the job has printed since the attempt began, the last megabytes of it."""
        if self.output is None or not Path(self.output).is_file():
            return ""
        with open(self.output, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self.output_offset, size - 4_000_000))
            return file.read().decode(errors="replace")

    def skip_output(self) -> None:
        """What the job has printed up to now, its preflight's words, says nothing of the trainer."""
        if self.output is not None and Path(self.output).is_file():
            self.output_offset = Path(self.output).stat().st_size

    def save(self) -> None:
        fields = dataclasses.asdict(self)
        del fields["folder"]
        write_json(self.folder / "attempt.json", fields)


def new_attempt(recipe: Recipe, job_id: str, nodes: list[str], nproc_per_node: int) -> Attempt:
    """Begin an attempt, in a folder of its own; its output is this process's."""
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
    """The first from `number` on that nobody has: two jobs may begin at once, and a kill leaves a folder empty."""
    attempts.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            (folder := attempts / f"{number:04d}").mkdir()
            return folder
        except FileExistsError:
            number += 1


def attempts(run: Path) -> list[Attempt]:
    """Every attempt of a run, in their order; fields that this version does not know are left out."""
    found = []
    known = {field.name for field in dataclasses.fields(Attempt)} - {"folder"}
    # Not what somebody set aside, as 0002.kept.
    paths = [path for path in run.glob("attempts/*/attempt.json") if path.parent.name.isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.parent.name)):
        try:
            fields = json.loads(path.read_bytes()).items()
            found.append(Attempt(folder=path.parent, **{name: value for name, value in fields if name in known}))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not readable ({error}); remove its folder to go on without it") from error
    return found


def farthest_step(metrics: Path, attempt: Attempt | None) -> int | None:
    """The farthest step that is in metrics.jsonl, of all attempts up to `attempt`, the last; None where there is none.

    Only what came since that attempt's begin is read: its record knows the rest.
    """
    if attempt is None or not metrics.exists() or metrics.stat().st_size < attempt.metrics_offset:
        # Somebody has begun again: what is not there was not done.
        return last_step(metrics)
    return max(attempt.done_before, last_step(metrics, attempt.metrics_offset) or 0) or None


def find_run(run: str | Path) -> Path:
    """A run's folder from its path, its name under runs/, or the number of one of its jobs."""
    text = str(run)
    for path in (Path(text), Path("runs") / text):
        # Path.is_file would raise for a name that is too long.
        if os.path.isfile(path / "recipe.yaml") or os.path.isfile(path / "submission.json"):
            return path
    if text.isdecimal():
        for path in sorted(Path("runs").glob("*/submission.json")):
            if text in job_ids(path.parent):
                return path.parent
        for job in _queue(text):
            if job.job_id == text and (job.script.parent / "submission.json").is_file():
                return job.script.parent
    known = sorted(path.parent.name for path in Path("runs").glob("*/recipe.yaml"))
    raise UserError(
        f"{shown(text)} is no run: no such folder with a recipe.yaml, here or in runs/, and no job of this number"
        f"{nearest(Path(text).name, known) or (f'; runs/ has {", ".join(known[:20])}' if known else '')}"
    )


def _queue(job: str) -> list[slurm.Job]:
    try:
        return slurm.queue()
    except slurm.NoAnswer as error:
        raise UserError(f"no run here was submitted as job {job}; name the run's folder ({error})") from None


def job_ids(run: Path, but: str = "") -> list[str]:
    """The numbers of the jobs that the run's last submission queued, but for one stage; of an array, of the whole."""
    jobs = read_submission(run).get("jobs", {})
    return [job_id for stage, of_stage in jobs.items() if stage != but for job_id in of_stage]


def load_run(run: Path) -> Recipe:
    """The recipe that a run folder keeps, for this folder, wherever it was written for.

    Earlier versions kept relative paths, which start where the run was submitted.
    """
    recipe, folder = load_recipe(run / "recipe.yaml"), run.resolve()
    if folder.is_relative_to(recipe.run_path.resolve()):
        return recipe
    checkpoint, begin = recipe.checkpoint, read_submission(run).get("directory", "")
    if checkpoint.directory and not os.path.isabs(checkpoint.directory):
        checkpoint = dataclasses.replace(checkpoint, directory=os.path.join(begin, checkpoint.directory))
    return dataclasses.replace(recipe, run_directory=str(folder), checkpoint=checkpoint)
