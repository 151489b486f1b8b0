"""A folder that appears complete or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_txssm.errors import UserError


def check_absent(out: Path) -> None:
    """UserError where `out` exists."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; name another OUT, or remove it")


@contextmanager
def complete_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` where the block ends, and is removed where it fails.

    UserError where `out` exists, its parent cannot be written, or the disk has less than `nbytes` left or fills up.
    """
    check_absent(out)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}; name another OUT") from None
    try:
        if shutil.disk_usage(partial).free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield partial
        partial.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out} cannot be made: {error}") from None
        raise UserError(
            f"{out} cannot be written: {error.strerror}; it takes {nbytes:,} bytes: make room, or name another OUT"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
