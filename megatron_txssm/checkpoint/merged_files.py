"""Writes a weighted mean of checkpoints as a torch_dist checkpoint, one tensor at a time."""

import hashlib
import io
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter, save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_txssm.checkpoint.checksums import CHECKSUMS, checksum, to_text
from megatron_txssm.checkpoint.compat_saves import what_the_file_system_said
from megatron_txssm.checkpoint.saved_model import SavedModel
from megatron_txssm.checkpoint.steps import FORMAT
from megatron_txssm.errors import UserError

# Of the entries that are not tensors, those that Megatron may ask for when it loads weights: arguments of the run, and
# by their ending, scales of FP8.
_COMMON, _OF_MODULES = ("common_state", "rerun_state_machine_state"), "_extra_state"


def write_mean(
    folder: Path, parts: Sequence[SavedModel], weights: Sequence[float], advance: Callable[[int], None]
) -> list[str]:
    """Write the mean of `parts` to a new folder, all else like the last part; returns a SHA-256 of each part's weights.

    Computed in fp32 and stored in the last part's dtypes, without optimizer state and random states. `advance` is
    called with numbers of bytes read. UserError if a part is damaged or not finite.
    """
    planner = _MeanPlanner(parts, weights, advance)
    # A file for each tensor, whose checksums many ranks can check. Without copying ahead, one tensor is in memory.
    writer = FileSystemWriter(folder, single_file_per_rank=False, per_thread_copy_ahead=0)
    try:
        # It warns that it writes in one process, as requested.
        with warnings.catch_warnings(action="ignore"):
            save(planner.entries(), storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as failed:
        # Whatever was raised is wrapped, interrupts included.
        error = next(iter(failed.failures.values()))[0]
        raise (what_the_file_system_said(error) if isinstance(error, Exception) else error) from None
    for name in (FORMAT, "common.pt"):
        if (file := parts[-1].folder / name).is_file():
            shutil.copyfile(file, folder / name)
    return [digest.hexdigest() for digest in planner.digests]


def seal(folder: Path) -> None:
    """Write the checksums of all files."""
    files = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(to_text(files), encoding="utf-8")


class _MeanPlanner(DefaultSavePlanner):
    """Computes each entry when it is written."""

    def __init__(self, parts: Sequence[SavedModel], weights: Sequence[float], advance: Callable[[int], None]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts, self.weights, self.advance = parts, weights, advance
        self.digests = [hashlib.sha256() for _ in parts]

    def entries(self) -> dict[str, Any]:
        """What is written: tensors without memory, and empty bytes."""
        last = self.parts[-1]
        tensors = {n: torch.empty(1, dtype=last.dtype(n)).expand(last.entries[n].size) for n in sorted(last.entries)}
        others = [n for n, kind in last.index.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)]
        names = (name.partition("/")[0] for name in others)
        wanted = [name for name, of in zip(others, names, strict=True) if of in _COMMON or of.endswith(_OF_MODULES)]
        return {**tensors, **dict.fromkeys(wanted, b"")}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        name = write_item.index.fqn
        return self._bytes(name) if write_item.type is WriteItemType.BYTE_IO else self._mean(name)

    def _mean(self, name: str) -> torch.Tensor:
        mean = torch.zeros(self.parts[-1].entries[name].size)
        for part, weight, digest in zip(self.parts, self.weights, self.digests, strict=True):
            tensor = part.read_whole([name])[name]
            if not tensor.isfinite().all():
                raise UserError(f"{name} of step {part.step} is NaN or infinite; leave that step out")
            digest.update(name.encode())
            digest.update(tensor.view(torch.uint8).numpy())
            self.advance(tensor.nbytes)
            mean.add_(tensor.float(), alpha=weight)
        return mean.to(self.parts[-1].dtype(name))

    def _bytes(self, name: str) -> io.BytesIO:
        """Copied as they are: they are pickles."""
        last = self.parts[-1]
        piece = last.index.storage_data[MetadataIndex(name)]
        with open(last.folder / piece.relative_path, "rb") as file:
            file.seek(piece.offset)
            return io.BytesIO(file.read(piece.length))
