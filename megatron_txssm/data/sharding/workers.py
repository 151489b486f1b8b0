"""The processes in which local tasks run: forked from a server that has imported what they need."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import threading

from megatron_txssm.process_limits import check_temporary_folder
from megatron_txssm.recipe.corpus.schema import CorpusRecipe

# Imports of a task that the command itself does not need.
_IMPORTS = ["megatron_txssm.data.sharding.local_task", "gigatoken", "tokenizers"]


def start_worker_server() -> multiprocessing.context.ForkServerContext:
    """Start the server unless it is running; started early, it imports while the command prepares."""
    check_temporary_folder()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    # The server inherits the blocked signal: only the command handles a Ctrl-C during the imports.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def begin_worker() -> None:
    """Initialise a worker."""
    # Ctrl-C reaches every process of the terminal; the main process ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def run_task(recipe: CorpusRecipe, subset: str, task: int) -> None:
    """Finish one task, as datatrove's executor runs it: with its log, its statistics and its mark."""
    from megatron_txssm.data.sharding.local_task import LocalTask

    LocalTask(recipe, subset).run_task(task)


def _end_with_parent() -> None:
    """End a worker whose command was killed: the next run starts its own workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
