"""Runs a corpus's unfinished tasks through datatrove: on processes of this machine, or as Slurm job arrays."""

import contextlib
import io
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import cast

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from megatron_txssm.data.corpus_recipe import CorpusRecipe
from megatron_txssm.data.manifest import Plan, manifest_path, write_subset_manifest
from megatron_txssm.data.shard_task import ShardTask
from megatron_txssm.data.workers import begin_worker, start_worker_server
from megatron_txssm.errors import UserError

# Slurm's own default, where the cluster does not tell.
DEFAULT_MAX_ARRAY_SIZE = 1001
# The paths in a batch script: nothing that a shell would read as more than a word.
_PLAIN_PATH = re.compile(r"[\w.,:=@%/+-]+", re.ASCII)


def unfinished(recipe: CorpusRecipe, plan: Plan, subset: str) -> list[int]:
    """The tasks of a subset without a manifest; datatrove's own marks are made to agree with it."""
    tasks = range(len(plan.tasks[subset]))
    marks = logging_folder(recipe, subset) / "completions"
    open_tasks = []
    for task in tasks:
        mark = marks / f"{task:05d}"
        if manifest_path(recipe.path, subset, task).exists():
            if not mark.exists():
                marks.mkdir(parents=True, exist_ok=True)
                mark.touch()
        else:
            mark.unlink(missing_ok=True)
            open_tasks.append(task)
    if not open_tasks:
        write_subset_manifest(recipe.path, subset, len(tasks))
    return open_tasks


def run_locally(recipe: CorpusRecipe, plan: Plan, workers: int) -> None:
    """Finish every subset on `workers` processes of this machine; the first error ends them all."""
    tasks = [(subset, task) for subset in recipe.subsets for task in unfinished(recipe, plan, subset)]
    if not tasks:
        return
    executors = {subset: _local_tasks(recipe, plan, subset) for subset, _ in tasks}
    context = start_worker_server()
    # Not the pool of datatrove's own run(), which waits for ever when a worker is killed, for its memory say.
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=begin_worker)
    try:
        # A Ctrl-C between two lines of the pool's start would leave it in a state that its end waits on for ever.
        with _ctrl_c_held_back():
            futures = [pool.submit(executors[subset].run_task, task) for subset, task in tasks]
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps for its memory; what is finished stays: run the same command again, "
            "with fewer --workers if memory is short"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def submit(recipe: CorpusRecipe, plan: Plan) -> dict[str, list[str]]:
    """Submit the unfinished tasks, one job array per subset, or as many as MaxArraySize needs; returns their ids."""
    limit = recipe.slurm.max_array_size or cluster_max_array_size()
    job_ids = {}
    for subset in recipe.subsets:
        if unfinished(recipe, plan, subset):
            array = _array(recipe, plan, subset, limit)
            # Its tasks look up their numbers in a file that another submission would rewrite.
            if queued := _squeue(array.job_name):
                raise UserError(
                    f"--slurm: jobs {', '.join(queued)} of {array.job_name} are still queued or running; "
                    f"see `txssm data status {recipe.path}`, and wait for them or end them with scancel"
                )
            with _quiet_main():
                array.run()
            job_ids[subset] = array.job_ids
    return job_ids


def cluster_max_array_size() -> int:
    """MaxArraySize of this cluster: one more than the largest index of a job array."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _slurm("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE


def _squeue(job_name: str) -> list[str]:
    """The ids of this user's jobs of a name."""
    return sorted(set(_slurm("squeue", "--noheader", "--me", f"--name={job_name}", "--format=%A").split()))


def _slurm(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except FileNotFoundError:
        raise UserError(f"--slurm: there is no {command[0]} on this machine; run it on a login node") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"--slurm: {shlex.join(command)}: {error.stderr.strip()}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"--slurm: {command[0]} does not answer ({error}); is slurmctld up?") from None


def logging_folder(recipe: CorpusRecipe, subset: str) -> Path:
    return recipe.path / "logs" / subset


class _LocalTasks(LocalPipelineExecutor):
    """datatrove's executor, one task at a time."""

    def run_task(self, rank: int) -> None:
        # What datatrove writes to the terminal is in its log files, too; the terminal is for the progress.
        with contextlib.redirect_stderr(io.StringIO()):
            self._run_for_rank(rank)


def _local_tasks(recipe: CorpusRecipe, plan: Plan, subset: str) -> _LocalTasks:
    return _LocalTasks(
        [ShardTask(recipe, subset)],
        tasks=len(plan.tasks[subset]),
        logging_dir=str(logging_folder(recipe, subset)),
    )


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """A Ctrl-C that comes meanwhile is raised afterwards."""
    received = []
    previous = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _quiet_main() -> Iterator[None]:
    """Without the lines that datatrove writes to the terminal for itself."""
    from datatrove.utils.logging import logger, setup_default_logger

    logger.remove()
    try:
        yield
    finally:
        setup_default_logger()


class _Array(SlurmPipelineExecutor):
    """datatrove's executor, with the ids of all its arrays and without its job that merges statistics.

    That job would wait for ever where a task failed; the manifests hold the sums.
    """

    job_ids: list[str]

    def run(self) -> None:
        self.job_ids = []
        self.job_id_retriever = self._take_job_id
        try:
            super().run()
        except subprocess.CalledProcessError as error:
            # Its reason stands above, on sbatch's own stderr.
            raise UserError(f"--slurm: {shlex.join(error.cmd)} was refused (exit code {error.returncode})") from None

    def _take_job_id(self, output: str) -> str:
        self.job_ids.append(output.split()[-1])
        return self.job_ids[-1]

    def launch_merge_stats(self) -> None:
        pass

    def get_sbatch_args(self, max_array: int = 1) -> dict:
        """Without the partition where none is named: the cluster has a default."""
        return {name: value for name, value in super().get_sbatch_args(max_array).items() if value is not None}


def _array(recipe: CorpusRecipe, plan: Plan, subset: str, limit: int) -> _Array:
    slurm = recipe.slurm
    folder = logging_folder(recipe, subset).resolve()
    if not _PLAIN_PATH.fullmatch(str(folder)):
        raise UserError(f"--slurm: {str(folder)!r} holds characters that a batch script cannot; use another output")
    # The jobs run where, and in the environment in which, this command runs.
    path, here = shlex.quote(str(Path(sys.executable).parent)), shlex.quote(os.getcwd())
    return _Array(
        [ShardTask(recipe, subset)],
        tasks=len(plan.tasks[subset]),
        time=slurm.time,
        # The annotation knows no default partition; get_sbatch_args does.
        partition=cast(str, slurm.partition),
        cpus_per_task=slurm.cpus_per_task,
        mem_per_cpu_gb=slurm.memory_per_cpu_gb,
        workers=slurm.workers or -1,
        max_array_size=limit,
        # One array after another would keep most of a cluster idle at the end of each.
        max_array_launch_parallel=True,
        job_name=f"{recipe.name}-{subset}",
        # A cluster without accounting has none.
        qos="",
        env_command=f"export PATH={path}:$PATH && cd {here}",
        sbatch_args={name: value for name, _, value in (option.partition("=") for option in slurm.sbatch)},
        logging_dir=str(folder),
    )
