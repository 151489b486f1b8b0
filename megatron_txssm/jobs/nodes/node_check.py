"""Checks one node before training: srun runs it on every node; it prints one JSON object on one line.

Uses only the standard library, and modules that use no more: it must answer even if nothing else works on the node.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict

from megatron_txssm.jobs.nodes.gpu_check import check_gpus, limit
from megatron_txssm.versions import package_versions

# Caches that many processes write at once: on a network file system they cause stale handles and hangs.
CACHES = {
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor",
}
_NETWORK = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "afs", "panfs", "wekafs", "orangefs", "fuse.")
CONNECT_SECONDS = 10
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class NodeCheck:
    """What to check on a node; each field is an option of this program."""

    # Folders of the run and of its checkpoints.
    folder: Path
    checkpoints: Path
    recipe: Path
    # What the first node wrote into the attempt's folder, and into which file.
    token: str
    token_file: Path
    # HOST:PORT of the rendezvous.
    address: str
    # GPUs of the job on this node.
    gpus: int
    # Disk space that a checkpoint needs.
    free_bytes: int
    # Number of files that the run still has to create.
    free_inodes: int
    # Files that a rank keeps open.
    open_files: int

    @property
    def words(self) -> list[str]:
        return [f"--{each.name.replace('_', '-')}={getattr(self, each.name)}" for each in fields(self)]


class Clock(TypedDict):
    """How far the first node's clock is ahead of this node's, and the uncertainty of that."""

    ahead_seconds: float
    uncertain_seconds: float


class NodeReport(TypedDict):
    """A node's report."""

    node: str
    problems: list[str]
    warnings: list[str]
    # None if the first node could not be reached.
    clock: Clock | None
    # Compared across nodes.
    facts: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="the run folder")
    parser.add_argument("--checkpoints", type=Path, help="their folder")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--token", help="what the first node wrote into the attempt's folder")
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--address", help="HOST:PORT of the rendezvous")
    parser.add_argument("--gpus", type=int, help="GPUs that the job has on this node")
    parser.add_argument("--free-bytes", type=int, help="that a checkpoint needs")
    parser.add_argument("--free-inodes", type=int, default=0, help="files that the run may still make")
    parser.add_argument("--open-files", type=int, default=0, help="that a rank keeps open")
    args = parser.parse_args()
    print(json.dumps(report(NodeCheck(**vars(args)))), flush=True)


def report(check: NodeCheck) -> NodeReport:
    """Run all checks on this node."""
    problems: list[str] = []
    warnings: list[str] = []
    clock = _clock_offset(check.address, problems)
    check_gpus(check.gpus, problems, warnings)
    _check_folder(check, problems, warnings)
    _check_open_files(limit("OPEN_FILES", check.open_files, warnings), problems)
    # NCCL's buffers between a node's GPUs; containers have 64 MB by default.
    _check_shared_memory(limit("SHM_MB", 1024 if check.gpus else None, warnings), problems)
    for name, default in CACHES.items():
        folder = os.path.realpath(os.path.expanduser(os.environ.get(name, default)))
        if (kind := _file_system(folder)).startswith(_NETWORK):
            warnings.append(f"{name}={folder} is on {kind}; set it to a folder on the node's own disk (slurm/env.sh)")
        _check_owner(name, folder, problems)
    facts = {"recipe sha256": _sha256(check.recipe), "python": sys.version.split()[0], **package_versions()}
    return {
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "problems": problems,
        "warnings": warnings,
        "clock": clock,
        "facts": facts,
    }


def _clock_offset(address: str, problems: list[str]) -> Clock | None:
    """Ask the first node for its time at the rendezvous port; None, with a problem, if it cannot be reached."""
    host, _, port = address.rpartition(":")
    try:
        begin = time.time()
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS) as connection:
            theirs = float(connection.makefile().readline())
        end = time.time()
    except (OSError, ValueError) as error:
        problems.append(f"the rendezvous at {address} cannot be reached ({error})")
        return None
    return {"ahead_seconds": theirs - (begin + end) / 2, "uncertain_seconds": (end - begin) / 2}


def _check_folder(check: NodeCheck, problems: list[str], warnings: list[str]) -> None:
    try:
        if check.token_file.read_text() != check.token:
            problems.append(f"{check.folder} is not the first node's: it must be on a shared file system")
            return
        with tempfile.NamedTemporaryFile(dir=check.folder, prefix=".preflight-") as file:
            file.write(b"x" * 65536)
            file.flush()
            os.fsync(file.fileno())
    except FileNotFoundError:
        problems.append(f"{check.folder} does not exist: it must be on a shared file system")
        return
    except OSError as error:
        problems.append(f"{check.folder} cannot be written: {error.strerror}")
        return
    try:
        free, needed = shutil.disk_usage(check.checkpoints).free / 1e9, check.free_bytes / 1e9
        files = os.statvfs(check.checkpoints)
    except OSError as error:
        problems.append(f"{check.checkpoints} cannot be reached: {error.strerror}")
        return
    if free < needed:
        problems.append(f"{check.checkpoints} has {free:.1f} GB left; a checkpoint takes {needed:.1f} GB")
    # Some file systems have no limit on files and report 0.
    least = limit("FREE_INODES", check.free_inodes, warnings)
    if least is not None and files.f_files > 0 and files.f_favail < least:
        problems.append(
            f"{check.checkpoints} has room for {files.f_favail} more files (inodes, df -i; limit {least:g}: "
            "TXSSM_PREFLIGHT_FREE_INODES)"
        )


def _check_shared_memory(least_mb: float | None, problems: list[str]) -> None:
    if least_mb is None or not os.path.isdir(SHARED_MEMORY):
        return
    if (free := shutil.disk_usage(SHARED_MEMORY).free / 1e6) < least_mb:
        problems.append(
            f"{SHARED_MEMORY} has {free:.0f} MB left (limit {least_mb:g}: TXSSM_PREFLIGHT_SHM_MB); free or enlarge it"
        )


def _check_open_files(needed: float | None, problems: list[str]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed is not None and hard != resource.RLIM_INFINITY and hard < needed:
        problems.append(f"a process may have {hard} files open (ulimit -Hn); a rank needs {needed:.0f} for its shards")


def _check_owner(name: str, folder: str, problems: list[str]) -> None:
    """The cache must belong to this user: ranks run code from it, and anybody may create its default folder."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        owner = os.stat(folder).st_uid
    except OSError as error:
        problems.append(f"{name}={folder} cannot be created: {error.strerror}")
        return
    if owner != os.getuid():
        problems.append(f"{name}={folder} belongs to user {owner}, not to this job's; set another in slurm/env.sh")


def _file_system(path: str) -> str:
    """The type of the file system that holds a path; the path need not exist yet."""
    best = ("", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        # A space is written as \040.
        mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount)
        if (path + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"unreadable ({error.strerror})"


if __name__ == "__main__":
    main()
