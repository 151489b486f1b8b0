"""Removes the checkpoints that a run need not keep (checkpoint.keep_last, keep_every). Does not import torch.

Kept are the newest sound ones, those of the stated steps, those with a file `keep`, and all that are damaged, newer
than the tracker's, symbolic links, or being read. A checkpoint is renamed before its files are deleted, so that an
interrupted removal leaves nothing that looks like one; `steps.interrupted_removals` finds what remains.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_txssm.checkpoint.reading import living_reader
from megatron_txssm.checkpoint.steps import REMOVED, Step, damage, interrupted_removals, tracked, whole_steps

# A user's mark: iter_0000020/keep.
KEEP = "keep"


def removable(checkpoints: Path, keep_last: int, keep_every: int | None = None) -> list[Step]:
    """The checkpoints that no rule keeps, the oldest first, readers aside; none unless the tracker's is sound."""
    newest = tracked(checkpoints)
    if newest is None or damage(newest.folder):
        return []
    sound = [step for step in whole_steps(checkpoints) if step.number <= newest.number]
    return [step for step in reversed(sound[keep_last:]) if not _is_kept(step, keep_every)]


def _is_kept(step: Step, keep_every: int | None) -> bool:
    on_time = keep_every is not None and step.number % keep_every == 0
    return on_time or step.folder.is_symlink() or os.path.lexists(step.folder / KEEP)


def remove_old(checkpoints: Path, keep_last: int, keep_every: int | None = None) -> Iterator[str]:
    """Remove what no rule keeps, and what earlier removals have left; yields a line for each that could not be."""
    for folder in interrupted_removals(checkpoints):
        yield from _delete(folder)
    for step in removable(checkpoints, keep_last, keep_every):
        try:
            reader = living_reader(step.folder)
            aside = None if reader else _put_aside(step.folder)
        except OSError as error:
            yield f"{step.folder} could not be removed: {error.strerror}"
            continue
        if aside is None:
            yield f"{step.folder} is kept as long as it is read ({reader or 'by a process that has just begun'})"
        else:
            yield from _delete(aside)


def _put_aside(folder: Path) -> Path | None:
    """Rename a checkpoint so that it counts as none; None if a reader has come meanwhile."""
    aside = folder.with_name(f"{REMOVED}{folder.name}_{secrets.token_hex(4)}")
    folder.rename(aside)
    if living_reader(aside) is None:
        return aside
    aside.rename(folder)
    return None


def _delete(folder: Path) -> Iterator[str]:
    errors: list[OSError] = []
    shutil.rmtree(folder, onexc=lambda _function, _path, error: errors.append(error))  # pyright: ignore[reportArgumentType]
    # The first one: the others follow from it. Files that other nodes hold open vanish later (NFS).
    if errors and folder.exists():
        why = f"{errors[0].strerror}: {errors[0].filename}"
        yield f"{folder} could not be deleted ({why}); this is tried again after the next save"
