"""Runs a corpus's unfinished tasks on processes of this machine."""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from megatron_txssm.data.corpus_recipe import CorpusRecipe
from megatron_txssm.data.manifest import Plan, logging_folder, manifest_path, write_subset_manifest
from megatron_txssm.data.workers import begin_worker, run_task, start_worker_server
from megatron_txssm.errors import UserError


def unfinished(recipe: CorpusRecipe, plan: Plan, subset: str) -> list[int]:
    """The tasks of a subset without a manifest; datatrove's own marks are made to agree with it."""
    tasks = range(len(plan.tasks[subset]))
    marks = logging_folder(recipe.path, subset) / "completions"
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
    context = start_worker_server()
    # Not the pool of datatrove's own run(), which waits for ever when a worker is killed, for its memory say.
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=begin_worker)
    try:
        # A Ctrl-C between two lines of the pool's start would leave it in a state that its end waits on for ever.
        with _ctrl_c_held_back():
            futures = [pool.submit(run_task, recipe, subset, task) for subset, task in tasks]
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
