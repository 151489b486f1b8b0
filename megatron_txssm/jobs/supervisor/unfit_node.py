"""Leaves a node on which the run folder is missing, read-only or on a full disk."""

import contextlib
import errno
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import NoReturn

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.supervisor.requeue import excluded_nodes, requeue
from megatron_txssm.notify import notify, wait_for_notifications

# Limit on nodes that a job avoids because the run folder is unusable there; beyond it, the folder is at fault.
MAX_UNUSABLE_NODES = 5
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_LOST = {errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EREMOTEIO, errno.ENXIO}


def check_run_folder(recipe: Path) -> None:
    """OSError if this node does not see the submitted recipe, or cannot write beside it."""
    # If started by hand, the recipe may be a name.
    if recipe.is_absolute():
        recipe.stat()
        with tempfile.TemporaryFile(dir=recipe.parent):
            pass


def check_checkpoints(folder: Path) -> None:
    """OSError if a file system has failed on this node; errors that the user must fix are ignored here."""
    try:
        if folder.exists():
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        if error.errno in _LOST:
            raise


def leave_node(run: Path, error: OSError | ImportError) -> NoReturn:
    """Requeue the job after an error in this process: held if the disk is full, otherwise without this node."""
    job, node = os.environ["SLURM_JOB_ID"], os.environ.get("SLURMD_NODENAME", socket.gethostname())
    say(f"ERROR on {node}: {error}")
    notify(run, "failed", f"{node}: {error}", nodes=[node])
    wait_for_notifications()
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        say(f"the job is requeued and held; make room, then: scontrol release {job}")
        requeue(job, hold=True)
    if len(excluded_nodes(job)) >= MAX_UNUSABLE_NODES:
        raise UserError(f"{error}; the job avoids {MAX_UNUSABLE_NODES} nodes already, so this is not a node's fault")
    say(f"the job is requeued without {node}")
    requeue(job, [node])


def say(text: str) -> None:
    # The output file may be on the full disk.
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", flush=True)
