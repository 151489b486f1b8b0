"""What the operating system lets a process have: open files, shared memory, short paths for sockets."""

import os
import resource
import shutil
import tempfile

from megatron_txssm.errors import UserError

# Of one shard: Megatron maps its .bin twice and its .idx once, and the three index files that it keeps in its cache.
FILES_A_SHARD = 6
# Python's and torch's own files, connections between ranks, logs, helper processes.
OTHER_FILES = 256
# An address of a socket in the file system has at most 107 bytes; of these multiprocessing and torch take 35.
LONGEST_TEMPORARY_FOLDER = 70
SHARED_MEMORY = "/dev/shm"


def allow_open_files() -> None:
    """Raise this process's soft limit of open files to the hard one; programs that it starts inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files(shards: int) -> int:
    """How many files a process that trains on `shards` keeps open at most."""
    return FILES_A_SHARD * shards + OTHER_FILES


def check_open_files(shards: int) -> None:
    """UserError where a process may not keep so many shards open."""
    needed, (_, hard) = open_files(shards), resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"the data are {shards} shards, for which a process keeps up to {needed} files open, but it may have "
            f"{hard} (ulimit -Hn); raise that limit, or make fewer and larger shards"
        )


def check_temporary_folder() -> None:
    """UserError where the folder for temporary files leaves no room for the names of sockets in it."""
    folder = tempfile.gettempdir()
    if (length := len(os.fsencode(folder))) > LONGEST_TEMPORARY_FOLDER:
        raise UserError(
            f"TMPDIR={folder} is {length} bytes long, but sockets in it can have no names behind more than "
            f"{LONGEST_TEMPORARY_FOLDER}; set TMPDIR to a shorter path, such as /tmp"
        )


def check_shared_memory(needed: int) -> None:
    """UserError where data loaders cannot pass on so many bytes."""
    if needed and os.path.isdir(SHARED_MEMORY) and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 1e6:.1f} MB left, but the data loaders pass up to {needed / 1e6:.1f} MB "
            "through it; free or enlarge it (docker run --shm-size), or set megatron.num_workers=0"
        )
