"""The weights of a checkpoint as safetensors: whole tensors by name, read file by file, without a GPU or a model.

Names and tensors are those of Megatron's checkpoint, and of a GPTModel's state dict at TP=1 but for these. The norm of
a linear layer is named after it, as Transformer Engine fuses them: `mlp.linear_fc1.layer_norm_weight`. What a
state-space layer packs per tensor-parallel rank comes by component, which is the better form outside, too:
`in_proj.weight.x`, `.B`, `.C`, `.dt` (with a gate, `.z` first), and of a convolution `conv1d_weight.x`, `.B`, `.C`; in
this order they concatenate to the packed tensor at TP=1. `mlp.linear_fc1.weight` holds the gate's rows, then those of
the up-projection; `self_attention.linear_qkv.weight`, query group by query group, its Q heads, K head and V head.
"""

import errno
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError
from megatron_txssm.launch.preflight import saved_step
from megatron_txssm.planning.parameters import count_parameters
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe

# Name on the command line -> torch's.
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# As in a bf16 model (model/state_space_mixer.py, FP32_PARAMETERS): decays compound over thousands of tokens.
KEPT_IN_FP32 = ("A_log", "dt_bias", "D")
# Their rows behind the vocabulary are padding.
VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
# Bytes that are read at a time. Each read parses the checkpoint's index again, which is large with many ranks.
_READ_BYTES = 256_000_000
_ANOTHER = "copy it again, or export another step with --step"


@dataclass(frozen=True)
class SavedModel:
    """The weights of one checkpoint, whose files are all there."""

    # The run's checkpoints, and the folder of this step among them.
    checkpoints: Path
    folder: Path
    step: int
    recipe: Recipe
    # Name -> torch's TensorStorageMetadata: whole size, dtype, chunks.
    tensors: Mapping[str, Any]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the export."""

    name: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def find_checkpoints(path: Path) -> Path:
    """The checkpoints folder of a run folder, or `path` where it is one; UserError where there is no checkpoint."""
    candidates = [path, path / "checkpoints"]
    # Only where it is stated: a copied run's recipe still names the old place.
    if (path / "recipe.yaml").is_file() and (stated := load_recipe(path / "recipe.yaml").checkpoint.directory):
        candidates.append(Path(stated))
    for folder in candidates:
        if saved_step(folder) is not None:
            return folder
    raise UserError(f"{path} holds no checkpoint; name a run's folder or its checkpoints, such as runs/demo")


def open_checkpoint(path: Path, step: int | None = None) -> SavedModel:
    """The newest checkpoint of a run, or that of a `step`; UserError unless it is whole."""
    checkpoints = find_checkpoints(path)
    made_by = checkpoints / "recipe.yaml"
    if not made_by.is_file():
        raise UserError(f"{checkpoints} has no recipe.yaml beside its checkpoints; `txssm pretrain` writes one")
    recipe = load_recipe(made_by)
    step, folder = _step_folder(checkpoints, step)
    index = _read_index(folder)
    tensors = {name: entry for name, entry in index.state_dict_metadata.items() if _is_weight(name, entry)}
    _check_files(folder, index.storage_data, tensors)
    found, wanted = sum(entry.size.numel() for entry in tensors.values()), count_parameters(recipe).total
    # More there may be, of Megatron's options that the recipe passes on.
    if found < wanted:
        raise UserError(f"{folder} holds {found:,} of {wanted:,} parameters that {made_by} describes; {_ANOTHER}")
    return SavedModel(checkpoints, folder, step, recipe, {name: tensors[name] for name in sorted(tensors, key=_order)})


def export(
    saved: SavedModel,
    folder: Path,
    *,
    dtype: str | None = None,
    max_file_bytes: int = 2_000_000_000,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Tensor]:
    """Write model.safetensors, or several files and model.safetensors.index.json, to `folder`; returns what they hold.

    `dtype`, `advance` and errors: see `tensors_of` and `_read`; OSError where a file cannot be written. A tensor larger
    than `max_file_bytes` has a file of its own. Memory: one file's tensors and one chunk of the checkpoint.
    """
    tensors = tensors_of(saved, dtype)
    files = split_files(tensors, max_file_bytes)
    metadata = {"format": "pt", "layout": "megatron", "step": str(saved.step)}
    for name, members in files.items():
        _write_file(folder / name, _read(saved, members, advance), metadata)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {tensor.name: name for name, members in files.items() for tensor in members},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return tensors


def tensors_of(saved: SavedModel, dtype: str | None = None) -> list[Tensor]:
    """What an export holds, in the order of the model's layers. dtype: a key of DTYPES, None: each as it is saved."""
    import torch

    tensors: list[Tensor] = []
    for name, entry in saved.tensors.items():
        rows, *rest = entry.size
        if name in VOCABULARY_TENSORS:
            rows = saved.recipe.data.vocab_size
        to = None if dtype is None or name.rpartition(".")[2] in KEPT_IN_FP32 else getattr(torch, DTYPES[dtype])
        tensors.append(Tensor(name, (rows, *rest), to or entry.properties.dtype))
    return tensors


def split_files(tensors: Sequence[Tensor], max_file_bytes: int) -> dict[str, list[Tensor]]:
    """File name -> its tensors, in order, as few files as that gives; named as Hugging Face names them."""
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.nbytes > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}


def _is_weight(name: str, entry: Any) -> bool:
    """Neither optimizer state nor what Megatron saves as bytes, without a size (random states, `_extra_state`)."""
    return hasattr(entry, "size") and "optimizer" not in name.split(".")


def _order(name: str) -> list[Any]:
    """As the model computes, layer 10 behind layer 9."""
    parts = ("embedding", "decoder.layers", "decoder", "output_layer")
    place = next((n for n, part in enumerate(parts) if name.startswith(part)), len(parts))
    return [place, *(int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", name))]


def _step_folder(checkpoints: Path, step: int | None) -> tuple[int, Path]:
    named = "latest_checkpointed_iteration.txt" if step is None else f"--step {step}"
    step = saved_step(checkpoints) if step is None else step
    assert step is not None
    # A `release` counts as step 0.
    for folder in (checkpoints / f"iter_{step:07d}", checkpoints / "release"):
        if folder.is_dir() and (step == 0 or folder.name != "release"):
            return step, folder
    there = ", ".join(path.name.removeprefix("iter_").lstrip("0") for path in sorted(checkpoints.glob("iter_*")))
    raise UserError(f"{checkpoints} has no step {step}, which {named} names; use --step with one of {there or 'none'}")


def _read_index(folder: Path) -> Any:
    """torch's Metadata of a torch_dist checkpoint. It is a pickle: see the README on whose checkpoints to load."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder} is no whole torch_dist checkpoint: it has no .metadata; copy it again, or --step")
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # whatever the damage makes pickle raise
        raise UserError(f"{folder / '.metadata'} is damaged ({_said(error)}); {_ANOTHER}") from None


def _check_files(folder: Path, storage: Mapping[Any, Any], tensors: Mapping[str, Any]) -> None:
    """UserError unless every file that holds a piece of `tensors` is there, up to the piece's last byte."""
    ends: dict[str, int] = {}
    for index, piece in storage.items():
        if index.fqn in tensors:
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing, one of {len(ends)} files with weights; {_ANOTHER}")
        if (size := file.stat().st_size) < end:
            raise UserError(f"{file} is cut short: {size:,} bytes of at least {end:,}; {_ANOTHER}")


def _read(saved: SavedModel, tensors: Sequence[Tensor], advance: Callable[[int], None]) -> dict[str, Any]:
    """Name -> whole tensor, put together from the checkpoint's chunks and cast as each is read."""
    import torch
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

    whole: dict[str, Any] = {}
    for batch in split_files(tensors, _READ_BYTES).values():
        read = {t.name: torch.empty(saved.tensors[t.name].size, dtype=t.dtype) for t in batch}
        try:
            # It says that it reads in one process, which is what it was asked for.
            with warnings.catch_warnings(action="ignore"):
                load(read, storage_reader=FileSystemReader(saved.folder), no_dist=True)
        # torch's CheckpointException is no Exception.
        except (Exception, CheckpointException) as error:
            raise UserError(f"{saved.folder} is damaged ({_said(error)}); {_ANOTHER}") from None
        for tensor in batch:
            padded = read.pop(tensor.name)
            whole[tensor.name] = padded if padded.shape == tensor.shape else padded[: tensor.shape[0]].clone()
            advance(tensor.nbytes)
    return whole


def _write_file(file: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    # The library's own is the owner's alone, whatever the umask says.
    mode = file.stat().st_mode
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        # Not an OSError, though the disk is what fails.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error
    file.chmod(mode)


def _said(error: BaseException) -> str:
    """What went wrong in one line; of a CheckpointException, what went wrong first."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
