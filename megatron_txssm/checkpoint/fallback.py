"""Which checkpoint a run goes on from: the ranks agree on the newest whole one, and share the work of proving it."""

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
    """The checkpoints of a folder, from the best to the worst, as rank 0 sees them. Every rank asks in step.

    `find_next` returns the next that is whole, on all ranks the same; None where there has never been one.
    DamagedCheckpoint where there were some, but none is whole. `reject` says what is wrong with it all the same.
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
        """From now on the tracker names this step, for whoever reads it next."""
        from_rank_0(lambda: write_tracker(self.folder, step))


def find_damage(step: Step, verify: bool | str) -> str:
    """What is wrong with one checkpoint; empty where nothing is. Every rank reads its share of the files."""
    import torch.distributed as dist

    if why := from_rank_0(lambda: damage(step.folder) or _damage_by_index(step.folder)):
        return why
    files = from_rank_0(lambda: checksums.read_checksums(step.folder))
    if files is None:
        return ""
    names = checksums.files_to_hash(files, verify, turn=step.number)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # The longest first, so that the shares are alike.
    names.sort(key=lambda name: -files[name].size)
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, checksums.wrong_contents(step.folder, names[rank::ranks], files))
    return next((why for why in found if why), "")


def _damage_by_index(folder: Path) -> str:
    """Of a checkpoint without checksums: files that end before what the index says is in them."""
    if checksums.read_checksums(folder) is not None or not (folder / ".metadata").is_file():
        return ""
    from megatron_txssm.checkpoint.saved_model import damage_by_index

    return damage_by_index(folder)


def from_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` gives on rank 0, on every rank; what it raises there is raised on every rank."""
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
    """What to say of a checkpoint of which nobody can know whether it is what was saved; empty of another."""
    try:
        files = checksums.read_checksums(step.folder)
    except DamagedCheckpoint:
        return ""
    if verify is False or (files and any(entry.digest for entry in files.values())):
        return ""
    return f"{step.folder} has no checksums; its files are loaded unverified"


def newest_finite(checkpoints: Path, seconds: float = math.inf) -> Step | None:
    """The newest checkpoint that is whole and whose weights, read from the disk, are finite. In one process.

    TimeoutError where reading takes longer than `seconds`.
    """
    steps, _ = candidates(checkpoints)
    end = time.monotonic() + seconds
    return next((step for step in steps if not (damage(step.folder) or weight_not_finite(step.folder, end))), None)


def weight_not_finite(folder: Path, end: float = math.inf) -> str:
    """The first weight of a checkpoint that is NaN, infinite or not readable; empty where all are finite.

    Reads the weights, and not what the optimizer keeps, a gigabyte at a time. TimeoutError at `end` of time.monotonic.
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
