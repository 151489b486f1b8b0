"""Files that name a living process: of a run in its folder, of a reader in a checkpoint; on any shared file system.

A file names host, process, Slurm job and start time of its holder, which removes it at its end. After a kill, the file
counts as long as its holder may be alive:

- On the same machine, the process itself is looked up, unless the file is a copy (its inode differs). If the process
  was killed a moment ago, its end is awaited.
- If Slurm restarted the job, its earlier starts have ended.
- Otherwise, a living holder touches the file every few seconds. Whoever asks waits to see whether that happens, unless
  the last touch is too long ago.

Kernel locks (flock, fcntl) would be simpler, but whether nodes share them depends on mount options.
"""

import json
import os
import re
import secrets
import signal
import socket
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_txssm.typed_json import parse_json, read_json, typed_fields

NAME = "running.json"
BEAT_SECONDS, STALE_SECONDS = 10.0, 60.0
# After this time without a touch, the holder is dead; no need to wait.
DEAD_SECONDS = 300.0


@dataclass(frozen=True)
class Holder:
    """A process that trains in a folder, or reads a checkpoint."""

    host: str
    pid: int
    # Clock ticks from boot to start; distinguishes the process from a later one with the same number.
    started_ticks: str | None
    # Ids of the machine's boot and of the container.
    boot: str
    pid_namespace: str
    job_id: str | None
    # How often Slurm has restarted the job.
    restarts: int
    since: str
    token: str
    # The lock file's own inode: a run folder may be copied while the run is alive.
    inode: int = 0

    @classmethod
    def myself(cls) -> "Holder":
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started_ticks=_started_ticks(os.getpid()),
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            pid_namespace=os.readlink("/proc/self/ns/pid"),
            job_id=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        job = f", job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def write_holder(file: Path, holder: Holder) -> None:
    """OSError, leaving no file, if it cannot be written in full; FileExistsError if it exists."""
    with open(file, "x", encoding="utf-8") as stream:
        try:
            json.dump(asdict(replace(holder, inode=os.fstat(stream.fileno()).st_ino)), stream)
            stream.flush()
        except OSError:
            file.unlink()
            raise


def living_holder(folder: Path, me: Holder, name: str = NAME) -> Holder | str | None:
    """Who holds a folder; None if nobody does or the holder is dead. `name`: of the lock file."""
    file = folder / name
    try:
        text = file.read_text(encoding="utf-8")
        inode = file.stat().st_ino
    except OSError:
        return None
    try:
        holder = Holder(**typed_fields(parse_json(text), Holder))
    except (ValueError, TypeError):
        # It is being written, or its writer died while writing.
        return f"{name} does not name it" if is_touched(file) else None
    if holder.token == me.token:
        return None
    on_this_machine = (holder.boot, holder.pid_namespace) == (me.boot, me.pid_namespace)
    if on_this_machine and holder.started_ticks != _started_ticks(holder.pid):
        return None
    if on_this_machine and holder.inode == inode:
        return None if _dies(holder.pid, holder.started_ticks) else holder
    if holder.job_id is not None and holder.job_id == me.job_id and holder.restarts < me.restarts:
        return None
    print(f"{file} names {holder}: checking for up to {STALE_SECONDS:.0f} s whether it is alive", flush=True)
    return holder if is_touched(file) else None


def is_held(folder: Path) -> bool:
    """Whether somebody seems to hold a folder; unlike `living_holder`, waits for no touch and does not need to write.

    The process is looked up if it ran on this machine; elsewhere the last touch decides, by this machine's clock.
    """
    file, me = folder / NAME, Holder.myself()
    try:
        holder, known = Holder(**typed_fields(read_json(file), Holder)), file.stat()
    except (OSError, ValueError, TypeError):
        return False
    if (holder.boot, holder.pid_namespace) == (me.boot, me.pid_namespace):
        return known.st_ino == holder.inode and holder.started_ticks == _started_ticks(holder.pid)
    return time.time() - known.st_mtime < STALE_SECONDS


def token_of(file: Path) -> str | None:
    """Which holder a file names; None if it cannot be read."""
    try:
        return read_json(file)["token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _started_ticks(pid: int) -> str | None:
    """None if the process does not exist or is a zombie."""
    try:
        # The fields after the command's name, which may contain any character.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _dies(pid: int, started_ticks: str | None) -> bool:
    """Whether a killed process ends within STALE_SECONDS: on a busy machine that takes a while."""
    end = time.monotonic() + STALE_SECONDS
    while _is_killed(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return _started_ticks(pid) != started_ticks


def _is_killed(pid: int) -> bool:
    """Whether it is exiting (PF_EXITING) or has a pending SIGKILL."""
    try:
        flags = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[6]
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    waiting = [int(mask, 16) for mask in re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)$", status, re.MULTILINE)]
    return bool(int(flags) & 0x4) or any(mask & 1 << (signal.SIGKILL - 1) for mask in waiting)


def is_touched(file: Path) -> bool:
    """Whether a file is touched or rewritten; False if it disappears or stays untouched for long."""
    before = _touched_ns(file)
    if before is not None and _untouched_seconds(file, before) > DEAD_SECONDS:
        return False
    end = time.monotonic() + STALE_SECONDS
    while before is not None and time.monotonic() < end:
        time.sleep(0.2)
        if (now := _touched_ns(file)) != before:
            return now is not None
    return False


def _untouched_seconds(file: Path, touched_ns: int) -> float:
    """Seconds since the last touch, by the file system's clock; 0 if unknown."""
    try:
        with tempfile.TemporaryFile(dir=file.parent) as now:
            return (os.fstat(now.fileno()).st_mtime_ns - touched_ns) / 1e9
    except OSError:
        return 0


def _touched_ns(file: Path) -> int | None:
    """None if the file does not exist. Opening it makes a network file system refresh its attributes."""
    try:
        with open(file, "rb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except OSError:
        return None
