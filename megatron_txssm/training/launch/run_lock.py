"""One run per folder: a run marks its folder with a file, on any file system shared by the nodes.

RUN/running.json names the holder, rank 0 (see holders.py), and is removed when the run ends.
"""

import contextlib
import os
import secrets
import sys
import threading
from pathlib import Path
from types import TracebackType

from megatron_txssm.errors import UserError
from megatron_txssm.holders import BEAT_SECONDS, NAME, Holder, living_holder, token_of, write_holder
from megatron_txssm.recipe.recipe import Recipe


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
            if token_of(file) == self.me.token:
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
                dead = token_of(file)
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
        write_holder(file, self.me)

    def _beat(self) -> None:
        while not self.released.wait(BEAT_SECONDS):
            for file in tuple(self.held):
                with contextlib.suppress(OSError):
                    os.utime(file)
                # None: the file server may be temporarily away. Another token: the lock is lost.
                if token_of(file) not in (None, self.me.token) and not self.released.is_set():
                    print(
                        f"error: {file} now belongs to another run; this one ends, to damage nothing", file=sys.stderr
                    )
                    sys.stderr.flush()
                    os._exit(1)


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
        if token_of(aside) != dead:
            # Another run has taken the lock meanwhile: restore its file.
            os.link(aside, file)
        aside.unlink()
