"""Submissions: everything that can be checked is checked before anything is written, everything is written before a
job is queued."""

import argparse
import contextlib
import shlex
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_txssm.errors import UserError
from megatron_txssm.files import write_file_atomically, write_json
from megatron_txssm.home import HOME
from megatron_txssm.jobs.allocation import Allocation
from megatron_txssm.jobs.attempts import job_ids
from megatron_txssm.jobs.frozen_code import FrozenCode
from megatron_txssm.jobs.limits import LIMITS
from megatron_txssm.jobs.submission_record import git_commit, make_record
from megatron_txssm.jobs.submit_lock import SubmitLock
from megatron_txssm.recipe.corpus_tokenizer import NoCorpus
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validate import validate
from megatron_txssm.slurm import client as slurm
from megatron_txssm.slurm.batch_script import render
from megatron_txssm.slurm.sbatch_options import Options, costly_defaults
from megatron_txssm.training.launch.preflight import (
    check_checkpoint,
    check_room,
    check_run,
    is_finished,
    make_run_directory,
    warnings,
)
from megatron_txssm.training.launch.run_lock import check_not_running

if TYPE_CHECKING:
    from megatron_txssm.recipe.corpus_recipe import CorpusRecipe


@dataclass
class Submission:
    """What is queued: stage -> batch script, in the order of their dependencies."""

    recipe: Recipe
    allocation: Allocation
    scripts: dict[str, str]
    # Jobs that must succeed before the first.
    after: list[str]
    # What submission.json holds, but for the jobs' numbers.
    record: dict[str, Any]
    # Sharded first; None where it is there.
    corpus: "CorpusRecipe | None"
    # What the jobs run; None where that is the checkout itself.
    code: FrozenCode | None
    jobs: dict[str, list[str]] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.recipe.run_path

    def show(self) -> int:
        """For --dry-run."""
        for stage, script in self.scripts.items():
            print(f"# {self.run}/{stage}.sbatch\n{script}")
        print(f"{self.recipe.name}: {self.allocation}; checked, nothing written, nothing queued")
        return 0

    def submit(self) -> int:
        """Write the run folder and queue the jobs, each after the one before it; all or none."""
        make_run_directory(self.recipe)
        with SubmitLock(self.recipe):
            # Another may have submitted it since it was checked. The shards of an earlier chain do not keep a new one
            # from it, but need their code.
            alive = _check_free(self.recipe)
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
                # Its whole path: a relative one may look like an option, and links hide which run a job is of.
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
            # One that is over does not keep the others, nor hide why they are taken back.
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


def plan_submission(
    recipe_name: str, overrides: list[str], allocation: Allocation, options: Options, args: argparse.Namespace
) -> Submission | None:
    """What would be queued, checked; None where the run is finished. UserError for the first thing that is wrong."""
    recipe = load_recipe(recipe_name, overrides)
    corpus = _corpus_to_shard(recipe, args.corpus) if args.chain else None
    if corpus is None:
        try:
            check_run(recipe, allocation.world_size)
        except NoCorpus as error:
            if not args.dry_run:
                raise UserError(f"{error} (or let --chain shard it first)") from None
            print(f"warning: a submission would be refused: {error}", file=sys.stderr)
            check_checkpoint(recipe)
    else:
        # Its shards are not there yet; the job itself checks them.
        validate(recipe, allocation.world_size)
    if corpus is None:
        for warning in warnings(recipe):
            print(f"warning: {warning}", file=sys.stderr)
    if is_finished(recipe) and not args.chain:
        print(f"{recipe.name}: finished before; {recipe.checkpoint_path} holds step {recipe.train_iters}")
        return None
    run = recipe.run_path.resolve()
    if not slurm.PLAIN_PATH.fullmatch(str(run)):
        raise UserError(f"run_directory={str(run)!r} holds characters that a batch script cannot; use another")
    commit = git_commit(HOME)
    code = FrozenCode(HOME, run, commit) if args.freeze_code else None
    home = code.path if code else HOME
    scripts = _scripts(recipe, home, allocation, options, args)
    check_room(recipe)
    if shutil.which("sbatch") or not args.dry_run:
        _check_free(recipe)
        for script in scripts.values():
            slurm.check_submission(script)
    else:
        print("there is no sbatch on this machine: not checked against a cluster", file=sys.stderr)
    if allocation.gpus_per_node and (costly := list(costly_defaults(options))):
        print(
            f"warning: this job does not ask for {', '.join(costly)}; unless the cluster gives it anyway, add "
            "--sbatch OPTION, or set TXSSM_SBATCH_OPTIONS in slurm/env.sh",
            file=sys.stderr,
        )
    record = make_record(recipe_name, overrides, allocation, commit, home)
    return Submission(recipe, allocation, scripts, args.after, record, corpus, code)


def _scripts(
    recipe: Recipe, home: Path, allocation: Allocation, options: Options, args: argparse.Namespace
) -> dict[str, str]:
    """Stage -> batch script. `home`: the code that they run."""
    run = recipe.run_path.resolve()
    limits = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in LIMITS]
    if allocation.spare:
        # Of the job's nodes, how many to train on.
        limits.append(f"--nodes={allocation.nodes}")

    def script(stage: str, more: Options, *words: str) -> str:
        names = {"job-name": f"{recipe.name}-{stage}"[:60], "output": f"{run}/logs/{stage}-%j.out"}
        return render(stage, {**names, **options, **more}, words, home)

    told = {"signal": f"TERM@{args.stop_before}"}
    scripts = {"pretrain": script("pretrain", allocation.options | told, f"{run}/recipe.yaml", *limits)}
    if args.chain:
        if (run / "export").exists():
            raise UserError(f"{run / 'export'} is there; --chain would convert into it: move or remove it")
        scripts["convert"] = script("convert", {}, str(run), f"{run}/export")
        scripts["evaluate"] = script("evaluate", replace(allocation, spare=0).options, str(run))
    return scripts


def _check_free(recipe: Recipe) -> set[str]:
    """UserError where the run has a job, or somebody trains in its folder without one; the numbers of other jobs."""
    run = recipe.run_path.resolve()
    alive = [job for job in slurm.queue() if not job.is_over]
    for job in alive:
        if job.script.parent == run:
            raise UserError(f"{recipe.run_path} has job {job.job_id} ({job.state}) already; see txssm jobs")
    check_not_running(recipe)
    return {job.job_id.partition("_")[0] for job in alive}


def _corpus_to_shard(recipe: Recipe, name: str | None) -> "CorpusRecipe | None":
    """The corpus recipe whose output is the recipe's data.corpus; None where that is sharded already."""
    from megatron_txssm.recipe.corpus_recipe import KEPT_RECIPE, corpus_recipe_files, load_corpus_recipe

    if recipe.data.corpus is None:
        raise UserError("--chain shards data.corpus, but the recipe names other data; leave --chain out")
    directory = Path(recipe.data.corpus)
    if _is_sharded(directory):
        return None
    begun = [str(directory)] if (directory / KEPT_RECIPE).exists() else list(corpus_recipe_files())
    candidates = begun if name is None else [name]
    for corpus in map(load_corpus_recipe, candidates):
        if corpus.path.resolve() == directory.resolve():
            return corpus
    raise UserError(
        f"none of the corpus recipes {', '.join(candidates)} makes data.corpus={directory}; "
        "state one that does: --corpus RECIPE"
    )


def _is_sharded(directory: Path) -> bool:
    from megatron_txssm.data.corpus.manifest import read_plan

    if not (directory / "plan.json").exists():
        return False
    return all((directory / subset / "manifest.json").exists() for subset in read_plan(directory).tasks)
