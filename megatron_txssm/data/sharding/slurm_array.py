"""Submits a corpus's unfinished tasks as Slurm job arrays, through datatrove."""

import contextlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from datatrove.executor.slurm import SlurmPipelineExecutor

from megatron_txssm.data.corpus.manifest import Plan, logging_folder
from megatron_txssm.data.sharding.run_local import unfinished
from megatron_txssm.data.sharding.shard_task import ShardTask
from megatron_txssm.errors import UserError
from megatron_txssm.home import HOME
from megatron_txssm.recipe.corpus.schema import CorpusRecipe
from megatron_txssm.slurm.batch_script import render
from megatron_txssm.slurm.client import PLAIN_PATH, run_slurm, run_squeue, sbatch_environment

# Slurm's own default, if the cluster does not report it.
DEFAULT_MAX_ARRAY_SIZE = 1001


def submit(recipe: CorpusRecipe, plan: Plan, home: Path = HOME) -> dict[str, list[str]]:
    """Submit the unfinished tasks, one job array per subset, or several if MaxArraySize requires; returns their ids.

    `home`: folder of the code that they run.
    """
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        # datatrove would take this process for one of its own tasks.
        raise UserError("--slurm: this is a task of a job array; submit from a login node")
    limit = recipe.slurm.max_array_size or cluster_max_array_size()
    arrays = {name: _array(recipe, plan, name, limit) for name in recipe.subsets if unfinished(recipe, plan, name)}
    for array in arrays.values():
        array.home = home
        # Its queued tasks look up their numbers in a file that another submission would rewrite.
        if queued := _squeue(array.job_name):
            raise UserError(
                f"--slurm: jobs {', '.join(queued)} of {array.job_name} are still queued or running; "
                f"see `txssm data status {recipe.path}`, and wait for them or end them with scancel"
            )
    for array in arrays.values():
        with _quiet_main(), _environment(sbatch_environment(array.get_sbatch_args())):
            array.run()
    return {subset: array.job_ids for subset, array in arrays.items()}


def cluster_max_array_size() -> int:
    """MaxArraySize of this cluster: one more than the largest index of a job array."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_slurm("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE


def _squeue(job_name: str) -> list[str]:
    """The ids of this user's jobs with this name."""
    return sorted(set(run_squeue("--me", "--all", f"--name={job_name}", "--format=%F").split()), key=int)


class _Array(SlurmPipelineExecutor):
    """datatrove's executor, with the ids of all its arrays and without its job that merges statistics.

    That job would wait forever if a task failed; the manifests hold the sums.
    """

    job_ids: list[str]
    home: Path

    def run(self) -> None:
        self.job_ids = []
        self.job_id_retriever = self._take_job_id
        try:
            super().run()
        except subprocess.CalledProcessError as error:
            # sbatch has printed the reason on its own stderr.
            before = f"; submitted before: {', '.join(self.job_ids)}" if self.job_ids else ""
            raise UserError(
                f"--slurm: {shlex.join(error.cmd)} was refused (exit code {error.returncode}){before}"
            ) from None
        except FileNotFoundError as error:
            if error.filename != "sbatch":
                raise
            raise UserError("--slurm: there is no sbatch on this machine; run it on a login node") from None

    def _take_job_id(self, output: str) -> str:
        # "Submitted batch job 123", perhaps "on cluster NAME".
        found = re.search(r"\d+", output)
        if found is None:
            raise UserError(f"--slurm: sbatch answers {output.strip()!r}, without a job's number")
        self.job_ids.append(found[0])
        return found[0]

    def launch_merge_stats(self) -> None:
        pass

    def get_sbatch_args(self, max_array: int = 1) -> dict:
        """datatrove's options without unset ones, such as the partition, for which the cluster has a default."""
        return {name: value for name, value in super().get_sbatch_args(max_array).items() if value is not None}

    def get_launch_file_contents(self, sbatch_args: dict, run_script: str) -> str:
        """Our batch script, which loads the same pickle as datatrove's command."""
        _, pickled = shlex.split(run_script)
        # datatrove's "" is an option without a value.
        return render("shard", {name: str(value) or None for name, value in sbatch_args.items()}, [pickled], self.home)


def _array(recipe: CorpusRecipe, plan: Plan, subset: str, limit: int) -> _Array:
    slurm = recipe.slurm
    folder = logging_folder(recipe.path, subset).resolve()
    if not PLAIN_PATH.fullmatch(str(folder)):
        raise UserError(f"--slurm: {str(folder)!r} contains characters that a batch script cannot; use another output")
    return _Array(
        [ShardTask(recipe, subset)],
        tasks=len(plan.tasks[subset]),
        time=slurm.time,
        # The annotation excludes None, the default partition; get_sbatch_args accepts it.
        partition=cast(str, slurm.partition),
        cpus_per_task=slurm.cpus_per_task,
        mem_per_cpu_gb=slurm.memory_per_cpu_gb,
        workers=slurm.workers or -1,
        max_array_size=limit,
        # One array after another would leave most of a cluster idle at the end of each.
        max_array_launch_parallel=True,
        job_name=f"{recipe.name}-{subset}",
        # A cluster without accounting has no QOS.
        qos="",
        # The entrypoint starts the step.
        with_srun=False,
        sbatch_args={name: value for name, _, value in (option.partition("=") for option in slurm.sbatch)},
        logging_dir=str(folder),
    )


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set this process's environment, which datatrove passes on to sbatch."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet_main() -> Iterator[None]:
    """Suppress datatrove's own messages on the terminal."""
    from datatrove.utils.logging import logger, setup_default_logger

    logger.remove()
    try:
        yield
    finally:
        setup_default_logger()
