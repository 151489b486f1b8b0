"""One run per folder: a run marks its folder with a file, on any file system shared by the nodes.

RUN/running.json names host, process, Slurm job and start time of the holder, rank 0, and is removed when the run ends.
After a kill, the file counts as long as its holder may be alive:

- On the same machine, the process itself is looked up, unless the file is a copy (its inode differs). If the process
  was killed a moment ago, its end is awaited.
- If Slurm restarted the job, its earlier starts have ended.
- Otherwise, a living holder touches the file every few seconds. A new run waits to see whether that happens, unless the
  last touch is too long ago.

Kernel locks (flock, fcntl) would be simpler, but whether nodes share them depends on mount options.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe

NAME = "running.json"
BEAT_SECONDS, STALE_SECONDS = 10.0, 60.0
# After this time without a touch, the holder is dead; no need to wait.
DEAD_SECONDS = 300.0


@dataclass(frozen=True)
class Holder:
    """A process that trains in a folder."""

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


def check_not_running(recipe: Recipe, me: Holder | None = None) -> None:
    """UserError if another run writes to this run's folders."""
    for folder in _folders(recipe):
        if (holder := living_holder(folder, me or Holder.myself())) is not None:
            raise UserError(
                f"{folder} is in use by another run ({holder}); wait for its end or stop it, "
                f"or state another run_directory (if it has ended, remove {folder / NAME})"
            )


class RunLock:
    """Holds a run's folders, from `with` to its end or the process's end."""

    # Name of the lock file.
    name = NAME

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folders = self.choose_folders()
        self.me = Holder.myself()
        self.held: list[Path] = []
        self.released = threading.Event()

    def __enter__(self) -> "RunLock":
        try:
            for folder in self.folders:
                self._take(folder)
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        self.released.set()
        for file in self.held:
            if _token(file) == self.me.token:
                file.unlink(missing_ok=True)
        self.held.clear()

    def choose_folders(self) -> list[Path]:
        return _folders(self.recipe)

    def check(self) -> None:
        """UserError if another run holds one of the folders."""
        check_not_running(self.recipe, self.me)

    def _take(self, folder: Path) -> None:
        file = folder / self.name
        # Retried if another process removes the dead holder's file at the same time.
        for _ in range(3):
            try:
                self._write(file)
            except FileExistsError:
                dead = _token(file)
                self.check()
                _put_away(file, dead)
                continue
            except OSError as error:
                raise UserError(f"{file} cannot be written: {error.strerror}") from None
            self.held.append(file)
            return
        self.check()
        raise UserError(f"{file} keeps changing: another run is starting in {folder}; wait for its end")

    def _write(self, file: Path) -> None:
        """OSError, leaving no file, if it cannot be written in full; FileExistsError if it exists."""
        with open(file, "x", encoding="utf-8") as stream:
            try:
                json.dump(asdict(replace(self.me, inode=os.fstat(stream.fileno()).st_ino)), stream)
                stream.flush()
            except OSError:
                file.unlink()
                raise

    def _beat(self) -> None:
        while not self.released.wait(BEAT_SECONDS):
            for file in tuple(self.held):
                with contextlib.suppress(OSError):
                    os.utime(file)
                # None: the file server may be temporarily away. Another token: the lock is lost.
                if _token(file) not in (None, self.me.token) and not self.released.is_set():
                    print(
                        f"error: {file} now belongs to another run; this one ends, to damage nothing", file=sys.stderr
                    )
                    sys.stderr.flush()
                    os._exit(1)


def living_holder(folder: Path, me: Holder, name: str = NAME) -> Holder | str | None:
    """Who holds a folder; None if nobody does or the holder is dead. `name`: of the lock file."""
    file = folder / name
    try:
        text = file.read_text(encoding="utf-8")
        inode = file.stat().st_ino
    except OSError:
        return None
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        # It is being written, or its writer died while writing.
        return f"{name} does not name it" if _is_touched(file) else None
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
    return holder if _is_touched(file) else None


def is_held(folder: Path) -> bool:
    """Whether somebody seems to hold a folder; unlike `living_holder`, waits for no touch and does not need to write.

    The process is looked up if it ran on this machine; elsewhere the last touch decides, by this machine's clock.
    """
    file, me = folder / NAME, Holder.myself()
    try:
        holder, known = Holder(**json.loads(file.read_bytes())), file.stat()
    except (OSError, ValueError, TypeError):
        return False
    if (holder.boot, holder.pid_namespace) == (me.boot, me.pid_namespace):
        return known.st_ino == holder.inode and holder.started_ticks == _started_ticks(holder.pid)
    return time.time() - known.st_mtime < STALE_SECONDS


def _folders(recipe: Recipe) -> list[Path]:
    """The folders that a run writes to: its own, and that of its checkpoints if outside."""
    folders = [recipe.run_path]
    checkpoints = recipe.checkpoint_path
    if recipe.checkpoint.save_interval is not None and not checkpoints.resolve().is_relative_to(folders[0].resolve()):
        folders.append(checkpoints)
    return folders


def _put_away(file: Path, dead: str | None) -> None:
    """Remove a dead holder's file, unless another run has replaced it meanwhile."""
    aside = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        file.rename(aside)
        if _token(aside) != dead:
            # Another run has taken the lock meanwhile: restore its file.
            os.link(aside, file)
        aside.unlink()


def _token(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["token"]
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


def _is_touched(file: Path) -> bool:
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
