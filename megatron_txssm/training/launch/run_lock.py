"""One run a folder: who trains there leaves a file that says so, on any file system that the nodes share.

RUN/running.json holds host, process, Slurm job and begin of the holder, rank 0. It goes away when that ends. What a
killed holder leaves counts as long as it may live:

- On the same machine the process itself is looked for, unless the file is a copy: its number (inode) is another. One
  that was killed a moment ago is waited for.
- A job that Slurm started again has outlived its earlier starts.
- Else the file shows it: a living holder touches it every few seconds. Who comes waits to see whether it does, unless
  it was touched last too long ago.

Locks of the kernel (flock, fcntl) would be simpler, but whether nodes share them is a matter of mount options.
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
# So long ago that nobody need wait and see.
DEAD_SECONDS = 300.0


@dataclass(frozen=True)
class Holder:
    """A process that trains in a folder."""

    host: str
    pid: int
    # Tells a process from a later one of the same number: clock ticks between boot and start.
    started_ticks: str | None
    # Of the machine's boot, and of the container.
    boot: str
    pid_namespace: str
    job_id: str | None
    # How often Slurm has started the job again.
    restarts: int
    since: str
    token: str
    # The number of the file that says so. A run's folder may be copied while the run goes on.
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
    """UserError where another run writes to this run's folders."""
    for folder in _folders(recipe):
        if (holder := living_holder(folder, me or Holder.myself())) is not None:
            raise UserError(
                f"{folder} is in use by another run ({holder}); wait for its end or stop it, "
                f"or state another run_directory (if it has ended, remove {folder / NAME})"
            )


class RunLock:
    """Holds a run's folders, from `with` to its end or the process's."""

    # The file that says so.
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
        """UserError where another holds one of them."""
        check_not_running(self.recipe, self.me)

    def _take(self, folder: Path) -> None:
        file = folder / self.name
        # Once more where somebody else put the dead one's file away at the same time.
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
        raise UserError(f"{file} comes and goes: another is starting in {folder}; wait for its end")

    def _write(self, file: Path) -> None:
        """OSError, and no file, where it cannot be written whole; FileExistsError where it is there."""
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
                # A file server may be away for a while; another's name is certain.
                if _token(file) not in (None, self.me.token) and not self.released.is_set():
                    print(f"error: {file} is another run's now; this one ends, to spoil nothing", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(1)


def living_holder(folder: Path, me: Holder, name: str = NAME) -> Holder | str | None:
    """Who holds a folder; None where nobody does, or nobody who can be alive. `name`: of the file that says so."""
    file = folder / name
    try:
        text = file.read_text(encoding="utf-8")
        inode = file.stat().st_ino
    except OSError:
        return None
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        # It is just being written, or was cut off when its writer died.
        return f"{name} does not say whose" if _is_touched(file) else None
    if holder.token == me.token:
        return None
    on_this_machine = (holder.boot, holder.pid_namespace) == (me.boot, me.pid_namespace)
    if on_this_machine and holder.started_ticks != _started_ticks(holder.pid):
        return None
    if on_this_machine and holder.inode == inode:
        return None if _dies(holder.pid, holder.started_ticks) else holder
    if holder.job_id is not None and holder.job_id == me.job_id and holder.restarts < me.restarts:
        return None
    print(f"{file} names {holder}: looking whether it lives, for up to {STALE_SECONDS:.0f} s", flush=True)
    return holder if _is_touched(file) else None


def _folders(recipe: Recipe) -> list[Path]:
    """Those that a run writes to: its own, and its checkpoints' where they lie elsewhere."""
    folders = [recipe.run_path]
    checkpoints = recipe.checkpoint_path
    if recipe.checkpoint.save_interval is not None and not checkpoints.resolve().is_relative_to(folders[0].resolve()):
        folders.append(checkpoints)
    return folders


def _put_away(file: Path, dead: str | None) -> None:
    """Remove what a dead holder left, unless it has become another's in between."""
    aside = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        file.rename(aside)
        if _token(aside) != dead:
            # Taken by another in the meantime, who shall keep it.
            os.link(aside, file)
        aside.unlink()


def _token(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _started_ticks(pid: int) -> str | None:
    """None where there is no such process, or only what its parent has not collected."""
    try:
        # Behind the command's name, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _dies(pid: int, started_ticks: str | None) -> bool:
    """Whether a process has been killed, and has ended within STALE_SECONDS: a busy machine takes a while."""
    end = time.monotonic() + STALE_SECONDS
    while _is_killed(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return _started_ticks(pid) != started_ticks


def _is_killed(pid: int) -> bool:
    """Whether it is ending (PF_EXITING), or SIGKILL waits for it."""
    try:
        flags = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[6]
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    waiting = [int(mask, 16) for mask in re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)$", status, re.MULTILINE)]
    return bool(int(flags) & 0x4) or any(mask & 1 << (signal.SIGKILL - 1) for mask in waiting)


def _is_touched(file: Path) -> bool:
    """Whether somebody touches a file, or writes it anew; False where it goes away or nobody does for long."""
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
    """How long ago it was touched, by the clock that the file system goes by; 0 where that cannot be told."""
    try:
        with tempfile.TemporaryFile(dir=file.parent) as now:
            return (os.fstat(now.fileno()).st_mtime_ns - touched_ns) / 1e9
    except OSError:
        return 0


def _touched_ns(file: Path) -> int | None:
    """None where it is not there. Opening makes a network file system look at it afresh."""
    try:
        with open(file, "rb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except OSError:
        return None
