"""A checked submission: writes the run folder and queues the jobs."""

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError
from megatron_txssm.files import write_file_atomically, write_json
from megatron_txssm.home import HOME
from megatron_txssm.jobs.attempts import job_ids
from megatron_txssm.jobs.submission.allocation import Allocation
from megatron_txssm.jobs.submission.frozen_code import FrozenCode
from megatron_txssm.jobs.submission.submit_lock import SubmitLock
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.submission import SubmissionRecord
from megatron_txssm.training.launch.preflight import make_run_directory
from megatron_txssm.training.launch.run_lock import check_not_running

if TYPE_CHECKING:
    from megatron_txssm.recipe.corpus.schema import CorpusRecipe


@dataclass
class Submission:
    """A checked submission; `scripts`: stage -> batch script, in the order of their dependencies."""

    recipe: Recipe
    allocation: Allocation
    scripts: dict[str, str]
    # Jobs that must succeed before the first.
    after: Sequence[str]
    # The contents of submission.json, without job numbers.
    record: SubmissionRecord
    # Sharded first; None if there is nothing to shard.
    corpus: "CorpusRecipe | None"
    # The code that the jobs run; None for the checkout itself.
    code: FrozenCode | None
    jobs: dict[str, list[str]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.recipe.run_path

    def show(self) -> int:
        """Print the batch scripts, for --dry-run."""
        for stage, script in self.scripts.items():
            print(f"# {self.run}/{stage}.sbatch\n{script}")
        print(f"{self.recipe.name}: {self.allocation}; checked, nothing written, nothing queued")
        return 0

    def submit(self) -> int:
        """Write the run folder and queue the jobs, each dependent on the one before it; all or none."""
        make_run_directory(self.recipe)
        with SubmitLock(self.recipe):
            # Another process may have submitted the run since the check. Shard jobs of an earlier chain do not prevent
            # a new one, but still need their code.
            alive = check_free(self.recipe)
            with contextlib.suppress(UserError):
                alive &= set(job_ids(self.run))
            self._write()
            self._queue()
            if self.code is not None and not alive:
                self.code.remove_others()
        print(f"follow with: txssm logs -f {shlex.quote(str(self.run))}")
        return 0

    def _queue(self) -> None:
        after = list(self.after)
        try:
            if self.corpus is not None:
                after += self._submit_shards(self.corpus)
            for stage in self.scripts:
                options = [f"--dependency=afterok:{':'.join(after)}"] if after else []
                # The resolved path: a relative one may look like an option, and links hide which run a job belongs to.
                job = slurm.submit(self.run.resolve() / f"{stage}.sbatch", *options)
                self._queued(stage, [job])
                after = [job]
        except BaseException as error:
            self._take_back()
            if isinstance(error, OSError):
                raise UserError(f"run_directory={self.run} cannot be written: {error.strerror}") from None
            raise

    def _take_back(self) -> None:
        for job in (job for jobs in self.jobs.values() for job in jobs):
            # A job that has ended must not keep the others queued, or hide the original error.
            with contextlib.suppress(UserError):
                slurm.run_slurm("scancel", job)

    def _write(self) -> None:
        try:
            if self.code is not None:
                self.code.write()
            (self.run / "logs").mkdir(exist_ok=True)
            write_file_atomically(self.run / "recipe.yaml", self.recipe.frozen(self.run).encode())
            for stage, script in self.scripts.items():
                write_file_atomically(self.run / f"{stage}.sbatch", script.encode())
            write_json(self.run / "submission.json", self.record | {"jobs": {}})
        except OSError as error:
            raise UserError(f"run_directory={self.run} cannot be written: {error.strerror}") from None

    def _submit_shards(self, corpus: "CorpusRecipe") -> list[str]:
        from megatron_txssm.data.sharding import slurm_array
        from megatron_txssm.data.sharding.make import prepare

        arrays = slurm_array.submit(corpus, prepare(corpus), self.code.path if self.code else HOME)
        jobs = [job for ids in arrays.values() for job in ids]
        if jobs:
            self._queued("shard", jobs)
        else:
            print(f"{corpus.path}: all tasks are finished")
        return jobs

    def _queued(self, stage: str, jobs: list[str]) -> None:
        self.jobs[stage] = jobs
        write_json(self.run / "submission.json", self.record | {"jobs": self.jobs})
        what = "shards" if stage == "shard" else str(self.allocation) if stage == "pretrain" else "after it"
        print(f"{stage}: job {', '.join(jobs)} ({what})", flush=True)
        if stage != "shard":
            print(f"  script {self.run}/{stage}.sbatch\n  output {self.run}/logs/{stage}-{jobs[0]}.out", flush=True)


def check_free(recipe: Recipe) -> set[str]:
    """UserError if the run has a job, or a process trains in its folder; returns the numbers of the user's jobs."""
    run = recipe.run_path.resolve()
    alive = [job for job in slurm.queue() if not job.is_over]
    for job in alive:
        if job.script.parent == run:
            raise UserError(f"{recipe.run_path} already has job {job.job_id} ({job.state}); see txssm jobs")
    check_not_running(recipe)
    return {job.job_id.partition("_")[0] for job in alive}
