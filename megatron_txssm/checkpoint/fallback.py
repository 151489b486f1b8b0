"""Which checkpoint a run resumes from: the ranks agree on the newest whole one, and share the work of checking it."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_txssm.checkpoint import checksums
from megatron_txssm.checkpoint.checksums import DamagedCheckpoint
from megatron_txssm.checkpoint.steps import Newest, Step, candidates, damage, lost_step, none_is_whole, write_tracker
from megatron_txssm.errors import UserError


class SoundSteps:
    """The checkpoints of a folder, from best to worst, as seen by rank 0. Every rank must make the same calls.

    `find_next` returns the next whole one, the same on all ranks; None if the folder has never had any.
    DamagedCheckpoint if there are some, but none is whole. `reject` records why the last one is still unusable.
    """

    def __init__(self, folder: Path, verify: bool | str):
        self.folder, self.verify = folder, verify
        self.steps, self.lost = from_rank_0(lambda: candidates(folder))
        self.there_were_some = bool(self.steps or self.lost)

    def find_next(self) -> Newest:
        while self.steps:
            step = self.steps.pop(0)
            if not (why := find_damage(step, self.verify)):
                self.current = step
                return Newest(step, tuple(self.lost))
            self.lost.append(lost_step(step, why))
        if self.there_were_some:
            raise none_is_whole(self.folder, self.lost)
        return Newest(None)

    def reject(self, why: str) -> None:
        self.lost.append(lost_step(self.current, why))

    def make_newest(self, step: Step) -> None:
        """Make the tracker name this step."""
        from_rank_0(lambda: write_tracker(self.folder, step))


def find_damage(step: Step, verify: bool | str) -> str:
    """The damage of one checkpoint; empty if there is none. Every rank reads its share of the files."""
    import torch.distributed as dist

    if why := from_rank_0(lambda: damage(step.folder) or _damage_by_index(step.folder)):
        return why
    files = from_rank_0(lambda: checksums.read_checksums(step.folder))
    if files is None:
        return ""
    names = checksums.files_to_hash(files, verify, turn=step.number)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Largest first, to balance the shares.
    names.sort(key=lambda name: -files[name].size)
    found = [""] * ranks
    dist.all_gather_object(found, checksums.wrong_contents(step.folder, names[rank::ranks], files))
    return next((why for why in found if why), "")


def _damage_by_index(folder: Path) -> str:
    """For a checkpoint without checksums: files that are shorter than the index requires."""
    if checksums.read_checksums(folder) is not None or not (folder / ".metadata").is_file():
        return ""
    from megatron_txssm.checkpoint.saved_model import damage_by_index

    return damage_by_index(folder)


def from_rank_0[T](work: Callable[[], T]) -> T:
    """The result of `work` on rank 0, on every rank; its exception is also raised on every rank."""
    import torch.distributed as dist

    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box = [work(), None]
        except (OSError, UserError) as error:
            box = [None, error]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def note_without_checksums(step: Step, verify: bool | str) -> str:
    """A note about a checkpoint that cannot be verified; empty if it can."""
    try:
        files = checksums.read_checksums(step.folder)
    except DamagedCheckpoint:
        return ""
    if verify is False or (files and any(entry.digest for entry in files.values())):
        return ""
    return f"{step.folder} has no checksums; its files are loaded unverified"


def newest_finite(checkpoints: Path, seconds: float = math.inf) -> Step | None:
    """The newest whole checkpoint whose weights, read from disk, are finite; in one process.

    TimeoutError if reading takes longer than `seconds`.
    """
    steps, _ = candidates(checkpoints)
    end = time.monotonic() + seconds
    return next((step for step in steps if not (damage(step.folder) or weight_not_finite(step.folder, end))), None)


def weight_not_finite(folder: Path, end: float = math.inf) -> str:
    """The first weight of a checkpoint that is NaN, infinite or unreadable; empty if all are finite.

    Reads the weights, not the optimizer state, a gigabyte at a time. TimeoutError at `end` of time.monotonic.
    """
    from megatron_txssm.checkpoint.saved_model import read_weights

    try:
        for name, tensor in read_weights(folder):
            if time.monotonic() > end:
                raise TimeoutError(f"{folder} could not be read in time")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return name
    except UserError as error:
        return str(error)
    return ""
