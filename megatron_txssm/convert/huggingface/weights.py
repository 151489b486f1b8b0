"""Writes the weights of a checkpoint as safetensors, in any format of formats/mapping.py, streamed file by file."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.architecture.parameters import ModelSizes
from megatron_txssm.checkpoint.saved_model import SavedModel
from megatron_txssm.checkpoint.tensors import DTYPES, NamedTensors, is_kept_in_fp32
from megatron_txssm.convert.formats.mapping import Group, hf_tensors, plan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Export:
    """What to write. With `dtype` bf16, KEPT_IN_FP32 are not converted."""

    saved: SavedModel
    format: str
    # A key of DTYPES; None: each tensor as saved.
    dtype: str | None

    @cached_property
    def sizes(self) -> ModelSizes:
        return self.saved.recipe.sizes

    @cached_property
    def groups(self) -> list[Group]:
        return plan(self.format, self.saved.shapes)

    @cached_property
    def tensors(self) -> NamedTensors:
        """The tensors without data, on torch's meta device."""
        return hf_tensors(self.groups, self.sizes, self.dtype_of)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def dtype_of(self, name: str) -> "torch.dtype":
        """The dtype of one of Megatron's tensors in the export."""
        import torch

        as_saved = self.dtype is None or is_kept_in_fp32(name)
        return self.saved.dtype(name) if as_saved else getattr(torch, DTYPES[self.dtype or ""])

    def group_bytes(self, group: Group) -> int:
        return sum(self.tensors[name].nbytes for name in group.hf)


def write_weights(
    export: Export, folder: Path, *, max_file_bytes: int, advance: Callable[[int], None] = lambda count: None
) -> dict[str, str]:
    """Write model.safetensors, or several files and model.safetensors.index.json, to `folder`.

    Returns the SHA-256 of each of Megatron's tensors as written, in the export's dtype. UserError if the checkpoint is
    damaged; OSError if a file cannot be written. A group larger than `max_file_bytes` gets its own file. Memory: one
    file's tensors, and one group as read from the checkpoint.
    """
    files = split_files(export, max_file_bytes)
    # One entry: the library writes several in varying order.
    metadata = {"format": "pt"}
    hashes: dict[str, str] = {}
    for name, groups in files.items():
        tensors: NamedTensors = {}
        for group in groups:
            tensors |= _converted(export, group, hashes)
            advance(export.group_bytes(group))
        _write_file(folder / name, tensors, metadata)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": export.nbytes},
            "weight_map": {name: file for file, groups in files.items() for group in groups for name in group.hf},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return hashes


def split_files(export: Export, max_file_bytes: int) -> dict[str, list[Group]]:
    """File name -> its groups; files are filled in order and named like Hugging Face's."""
    parts: list[list[Group]] = []
    room = 0
    for group in export.groups:
        if not parts or export.group_bytes(group) > room:
            parts.append([])
            room = max_file_bytes
        parts[-1].append(group)
        room -= export.group_bytes(group)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, start=1)}


def sha256_of(tensor: "torch.Tensor") -> str:
    """SHA-256 of a tensor's bytes, for any dtype."""
    import torch

    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def _converted(export: Export, group: Group, hashes: dict[str, str]) -> NamedTensors:
    read = export.saved.read(group.megatron)
    tensors = {name: tensor.to(export.dtype_of(name)) for name, tensor in read.items()}
    hashes |= {name: sha256_of(tensor) for name, tensor in tensors.items()}
    return group.to_hf(tensors, export.sizes)


def _write_file(file: Path, tensors: NamedTensors, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    # The library makes files accessible only to the owner, regardless of the umask.
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        # Raised instead of an OSError if writing to the disk fails.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error
    file.chmod(mode)
