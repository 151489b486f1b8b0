"""A run's own copy of the code, RUN/code/VERSION: a restarted job runs the code that was submitted.

The copy includes uncommitted changes and new files. Its name consists of the commit and a checksum over its files, so
the same code is copied only once.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_txssm import __version__
from megatron_txssm.errors import UserError
from megatron_txssm.home import HOME, PACKAGE

# Files of slurm/ that are copied besides the batch scripts. The site's settings, whatever their name, are not part of
# the code, and may hold secrets.
_OF_SLURM = ("entrypoint.sh", "env.example.sh")


class FrozenCode:
    """The copy of the code in a run folder, laid out like a checkout.

    `home`: a checkout, or `HOME`, which may be an installed package's.
    """

    def __init__(self, home: Path, run: Path, commit: str | None):
        self.home = home
        self.folder = run / "code"
        self.sum = _sum(home)
        self.path = self.folder / f"{(commit or __version__).partition('+')[0][:12]}-{self.sum[:12]}"
        if ":" in str(self.path):
            # PYTHONPATH would split it in two.
            raise UserError(
                f"run_directory={run} contains a colon, which PYTHONPATH cannot hold; use another, or --no-freeze-code"
            )

    def write(self) -> None:
        """Make the copy, atomically; a copy that was changed since is replaced. OSError."""
        if self.path.is_dir():
            if _sum(self.path) == self.sum:
                return
            _remove(self.path)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{self.path.name}.{secrets.token_hex(4)}"
        try:
            for relative, source in _files(self.home):
                target = partial / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
            if _sum(partial) != self.sum:
                raise UserError(f"the code in {self.home} has changed while it was copied; submit again")
            partial.rename(self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def remove_others(self) -> None:
        """Remove the copies of earlier and killed submissions; no job may still use them."""
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if path != self.path:
                    _remove(path)


def _remove(folder: Path) -> None:
    """Rename, then delete: other processes find the folder complete or not at all."""
    aside = folder.with_name(f".{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _files(home: Path) -> Iterator[tuple[Path, Path]]:
    """The files that a job needs, in a fixed order: path in the copy, source path."""
    # An installed package contains its home, not the other way round.
    package = PACKAGE if home == HOME else home / "megatron_txssm"
    for part, place in {"megatron_txssm": package, "recipes": home / "recipes", "slurm": home / "slurm"}.items():
        for folder, folders, files in os.walk(place):
            folders[:] = sorted(name for name in folders if name != "__pycache__" and Path(folder, name) != home)
            for name in sorted(files):
                is_ours = part != "slurm" or name in _OF_SLURM or name.endswith(".sbatch")
                if is_ours and not name.endswith((".pyc", ".partial")):
                    path = Path(folder, name)
                    yield part / path.relative_to(place), path


def _sum(home: Path) -> str:
    """SHA-256 over names and contents."""
    total = hashlib.sha256()
    for relative, path in _files(home):
        content = path.read_bytes()
        total.update(f"{relative}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return total.hexdigest()
