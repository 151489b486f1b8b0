"""Operating system limits of a process: open files, shared memory, the length of socket paths."""

import os
import resource
import shutil
import tempfile

from megatron_txssm.errors import UserError

# Per shard: Megatron maps the .bin twice, the .idx once, and three index files in its cache.
FILES_A_SHARD = 6
# Python's and torch's own files, connections between ranks, logs, helper processes.
OTHER_FILES = 256
# A socket's path has at most 107 bytes, of which multiprocessing and torch use 35.
LONGEST_TEMPORARY_FOLDER = 70
SHARED_MEMORY = "/dev/shm"


def allow_open_files() -> None:
    """Raise this process's soft limit of open files to the hard limit; child processes inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files(shards: int) -> int:
    """The maximum number of files that a process training on `shards` keeps open."""
    return FILES_A_SHARD * shards + OTHER_FILES


def check_open_files(shards: int) -> None:
    """UserError if a process may not keep this many shards open."""
    needed, (_, hard) = open_files(shards), resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"the data has {shards} shards, for which a process keeps up to {needed} files open, but the limit is "
            f"{hard} (ulimit -Hn); raise it, or make fewer and larger shards"
        )


def check_temporary_folder() -> None:
    """UserError if the path of the temporary folder is too long for sockets in it."""
    folder = tempfile.gettempdir()
    if (length := len(os.fsencode(folder))) > LONGEST_TEMPORARY_FOLDER:
        raise UserError(
            f"TMPDIR={folder} is {length} bytes long, but sockets need a path of at most "
            f"{LONGEST_TEMPORARY_FOLDER}; set TMPDIR to a shorter path, such as /tmp"
        )


def check_shared_memory(needed: int) -> None:
    """UserError if shared memory is too small for the data loaders' `needed` bytes."""
    if needed and os.path.isdir(SHARED_MEMORY) and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 1e6:.1f} MB left, but the data loaders pass up to {needed / 1e6:.1f} MB "
            "through it; free or enlarge it (docker run --shm-size), or set megatron.num_workers=0"
        )
