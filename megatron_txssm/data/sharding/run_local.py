"""Runs a corpus's unfinished tasks on processes of this machine."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megatron_txssm.data.corpus.manifest import Plan, logging_folder, manifest_path, write_subset_manifest
from megatron_txssm.data.sharding.workers import begin_worker, run_task, start_worker_server
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.schema import CorpusRecipe


def unfinished(recipe: CorpusRecipe, plan: Plan, subset: str) -> list[int]:
    """The tasks of a subset without a manifest; also tidies up after finished tasks that were killed."""
    tasks = range(len(plan.tasks[subset]))
    _remove_leftovers(recipe.path, subset)
    marks = logging_folder(recipe.path, subset) / "completions"
    open_tasks = []
    for task in tasks:
        # datatrove's own mark of a finished task.
        mark = marks / f"{task:05d}"
        if manifest_path(recipe.path, subset, task).exists():
            if not mark.exists():
                marks.mkdir(parents=True, exist_ok=True)
                mark.touch()
        else:
            mark.unlink(missing_ok=True)
            open_tasks.append(task)
    if not open_tasks:
        write_subset_manifest(recipe.path, subset)
    return open_tasks


def _remove_leftovers(directory: Path, subset: str) -> None:
    """Remove files of tasks that were killed after they wrote their manifest and before they tidied up."""
    for pattern in ("*.lock", "*.status.json", "*.partial"):
        for path in (directory / subset).glob(f"[0-9]{pattern}"):
            if (directory / subset / f"{path.name.partition('.')[0]}.json").exists():
                path.unlink(missing_ok=True)


def run_locally(recipe: CorpusRecipe, plan: Plan, workers: int) -> None:
    """Finish every subset on `workers` processes of this machine; the first error ends them all."""
    tasks = [(subset, task) for subset in recipe.subsets for task in unfinished(recipe, plan, subset)]
    if not tasks:
        return
    context = start_worker_server()
    try:
        # Not the pool of datatrove's own run(), which waits forever if a worker is killed, for example out of memory.
        pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=begin_worker)
    except OSError as error:  # its semaphores are there
        raise UserError(f"/dev/shm: {error.strerror}; processes share memory there: make room, and try again") from None
    try:
        # A Ctrl-C while the pool starts would leave it in a state in which its shutdown waits forever.
        with _ctrl_c_held_back():
            futures = [pool.submit(run_task, recipe, subset, task) for subset, task in tasks]
        for future in as_completed(futures):
            future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps out of memory; finished tasks are kept: run the same command again, "
            "with fewer --workers if memory is short"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Raise a Ctrl-C only after the body."""
    received = []
    previous = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt
