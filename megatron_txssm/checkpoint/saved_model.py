"""The weights of a Megatron checkpoint: whole tensors by name, read without a GPU or a model.

A checkpoint (torch_dist) stores tensors in chunks, as the ranks held them; reading joins them.
"""

import math
import os
import re
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.checkpoint.checksums import verify_files, wrong_sizes
from megatron_txssm.checkpoint.former_checkpoint import with_present_names
from megatron_txssm.checkpoint.reading import Reading
from megatron_txssm.checkpoint.steps import TRACKER, check_tracker, tracked
from megatron_txssm.checkpoint.tensors import (
    EMBEDDING,
    OUTPUT_LAYER,
    NamedTensors,
    Shape,
    compare_shapes,
    model_shapes,
    prediction_shapes,
)
from megatron_txssm.errors import UserError, nearest
from megatron_txssm.recipe.changes import without_prediction
from megatron_txssm.recipe.loader import load_recipe, recipe_names
from megatron_txssm.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


@dataclass(frozen=True)
class SavedModel:
    """The weights of one checkpoint without prediction depths; all files exist. See `tensors.Weights`."""

    # The run's checkpoints folder, and this step's folder in it.
    checkpoints: Path
    folder: Path
    step: int
    recipe: Recipe
    # Without padding, in the order of the model's layers.
    shapes: dict[str, Shape]
    # Name -> whole size, dtype and chunks; and the index that contains them.
    entries: "Mapping[str, TensorStorageMetadata]"
    index: "Metadata"
    # The command-line option that selects another step.
    option: str = "--step"
    # Depths of multi-token prediction, which the files have and this model does not.
    prediction_depths: int = 0
    # Whether the files have the names of versions that built GPTModel (former_checkpoint.py).
    has_former_names: bool = False
    # Keeps the checkpoint from being removed.
    reading: Reading | None = field(default=None, repr=False, compare=False)

    def dtype(self, name: str) -> "torch.dtype":
        return self.entries[name].properties.dtype

    def nbytes(self, name: str) -> int:
        """Size of a tensor, with vocabulary padding."""
        return math.prod(self.entries[name].size) * self.dtype(name).itemsize

    def read_whole(self, names: Iterable[str]) -> NamedTensors:
        """Name -> tensor, with vocabulary padding; also those of prediction depths. UserError if a file is damaged."""
        import torch

        tensors = {name: torch.empty(self.entries[name].size, dtype=self.dtype(name)) for name in names}
        try:
            _load(self.folder, self.index, tensors, self.option)
        except UserError:
            # torch's exception keeps this object alive.
            if self.reading is not None:
                self.reading.end()
            raise
        return tensors

    def read(self, names: Iterable[str]) -> NamedTensors:
        """Name -> tensor, without vocabulary padding; UserError if a file is damaged."""
        tensors = self.read_whole(names)
        rows = {name: self.shapes[name][0] for name in tensors}
        return {name: t if len(t) == rows[name] else t[: rows[name]].clone() for name, t in tensors.items()}


def find_checkpoints(path: Path) -> Path:
    """The checkpoints folder of a run folder, or `path` if it is one; UserError if there is no checkpoint."""
    # Path.exists raises for overlong names.
    if not os.path.exists(path):
        raise UserError(f"{path}: no such folder; {how_to_make(path)}")
    candidates = [path, path / "checkpoints"]
    # Only if stated: the recipe of a copied run still names the old place.
    if (path / "recipe.yaml").is_file() and (stated := load_recipe(path / "recipe.yaml").checkpoint.directory):
        candidates.append(Path(stated))
    for folder in candidates:
        if tracked(folder) is not None:
            return folder
        check_tracker(folder)
    if step := re.fullmatch(r"iter_(\d+)", path.name):
        raise UserError(f"{path} is a single step; name {path.parent}, with --step {int(step[1])}")
    raise UserError(f"{path} holds no checkpoint; name a run's folder or its checkpoints, such as runs/demo")


def how_to_make(path: Path) -> str:
    """A remedy for a missing run folder or export: a neighbour with a similar name, or the command that creates it."""
    if path.parent.name == "exports":
        return f"`txssm convert export {Path('runs') / path.name} {path}` makes it"
    if path.name == "demo":
        return "`txssm demo` makes runs/demo"
    if path.name in recipe_names():
        return f"`txssm pretrain {path.name}` makes runs/{path.name}"
    if hint := nearest(path.name, [neighbour.name for neighbour in path.parent.glob("*") if neighbour.is_dir()]):
        return hint.removeprefix("; ")
    return "`txssm pretrain RECIPE` makes a run, `txssm convert export RUN OUT` a Hugging Face folder"


def open_checkpoint(
    path: Path, step: int | None = None, option: str = "--step", recipe: Recipe | None = None
) -> SavedModel:
    """The newest checkpoint of a run, or that of a `step`; UserError unless it is whole.

    `option` selected the step. `recipe`: the model's; None: the recipe.yaml beside the checkpoints.
    """
    checkpoints = find_checkpoints(path)
    made_by = checkpoints / "recipe.yaml"
    described = f"{made_by} describes" if recipe is None else f"recipe {recipe.name} describes"
    recipe = recipe or recipe_beside(checkpoints)
    step, folder = step_folder(checkpoints, step, option)
    reading = Reading(folder)
    shapes = model_shapes(recipe)
    as_saved = _read_index(folder, option)
    index = with_present_names(as_saved, shapes, recipe.layers)
    entries = _weights(index)
    _check_files(folder, index, entries, option)
    found = {name: _without_padding(recipe, name, entry) for name, entry in entries.items()}
    if fault := compare_shapes(found, shapes | prediction_shapes(recipe.sizes)):
        raise UserError(f"{folder} is not the model that {described}: {fault}; {_another(option)}")
    verify_files(folder, recipe.checkpoint.verify, turn=step)
    depths = len(recipe.prediction_depths)
    made = (checkpoints, folder, step, without_prediction(recipe), shapes, entries, index, option)
    return SavedModel(*made, prediction_depths=depths, has_former_names=index is not as_saved, reading=reading)


def recipe_beside(checkpoints: Path) -> Recipe:
    """The recipe of the run that saved these checkpoints; UserError without one."""
    made_by = checkpoints / "recipe.yaml"
    if not made_by.is_file():
        raise UserError(
            f"{checkpoints} has no recipe.yaml, which `txssm pretrain` writes and stock Megatron-LM does not: copy the "
            "recipe that trained it there; `txssm convert export` takes it as --recipe"
        )
    return load_recipe(made_by)


def _another(option: str) -> str:
    return f"copy it again, or take another step with {option}"


def damage_of_newest(checkpoints: Path) -> str:
    """The damage of a run's newest checkpoint, including optimizer state; empty if every file is whole."""
    try:
        _, folder = step_folder(checkpoints, None)
    except UserError as error:
        return str(error)
    return wrong_sizes(folder) or damage_by_index(folder)


def damage_by_index(folder: Path) -> str:
    """The first file of a checkpoint that is shorter than the index requires; empty if there is none."""
    try:
        index = _read_index(folder, "--step")
        _check_files(folder, index, index.state_dict_metadata, "--step")
    except UserError as error:
        return str(error).removesuffix(f"; {_another('--step')}")
    return ""


def read_weights(folder: Path, at_once: int = 1 << 30) -> "Iterator[tuple[str, torch.Tensor]]":
    """Name and whole tensor of every weight of a checkpoint, `at_once` bytes at a time; UserError if it is damaged.

    Works without knowledge of the model.
    """
    import torch

    index = _read_index(folder, "--step")
    entries = _weights(index)
    _check_files(folder, index, entries, "--step")
    batch: NamedTensors = {}
    for number, (name, entry) in enumerate(entries.items(), 1):
        batch[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        if number == len(entries) or sum(tensor.nbytes for tensor in batch.values()) >= at_once:
            _load(folder, index, batch, "--step")
            yield from batch.items()
            batch = {}


def _load(folder: Path, index: "Metadata", tensors: NamedTensors, option: str) -> None:
    """Fill these tensors from the checkpoint; UserError if a file is damaged."""
    from torch.distributed.checkpoint import CheckpointException, load

    from megatron_txssm.checkpoint.torch_dist import IndexReader

    try:
        # It warns that it reads in one process, as requested.
        with warnings.catch_warnings(action="ignore"):
            load(tensors, storage_reader=IndexReader(folder, index), no_dist=True)
    # torch's CheckpointException is not an Exception.
    except (Exception, CheckpointException) as error:
        raise UserError(f"{folder} is damaged ({_said(error)}); {_another(option)}") from None


def _without_padding(recipe: Recipe, name: str, entry: "TensorStorageMetadata") -> Shape:
    rows, *rest = entry.size
    return (min(rows, recipe.data.vocab_size) if name in (EMBEDDING, OUTPUT_LAYER) else rows, *rest)


def _weights(index: "Metadata") -> "dict[str, TensorStorageMetadata]":
    """The entries without optimizer state, and without what is saved as bytes (random states, `_extra_state`)."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return {
        name: entry
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and "optimizer" not in name.split(".")
    }


def step_folder(checkpoints: Path, step: int | None, option: str = "--step") -> tuple[int, Path]:
    """(step, its folder) among a run's checkpoints, the newest for None; UserError that lists the existing steps."""
    named = TRACKER if step is None else f"{option} {step}"
    newest = tracked(checkpoints)
    # A `release` counts as step 0. Megatron also goes by the tracker.
    if newest is not None and step in (None, newest.number):
        step, folder = newest.number, newest.folder
    else:
        assert step is not None
        folder = checkpoints / f"iter_{step:07d}"
    if folder.is_dir():
        return step, folder
    there = ", ".join(str(int(path.name.removeprefix("iter_"))) for path in sorted(checkpoints.glob("iter_*[0-9]")))
    remedy = f"use {option} with one of {there}" if there else "there is none: copy the checkpoints again"
    raise UserError(f"{checkpoints} has no step {step}, which {named} names; {remedy}")


def _read_index(folder: Path, option: str) -> "Metadata":
    """The index of a torch_dist checkpoint."""
    from megatron_txssm.checkpoint.torch_dist import IndexReader

    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder} is no whole torch_dist checkpoint: it has no .metadata; {_another(option)}")
    try:
        return IndexReader(folder).read_metadata()
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{folder / '.metadata'} is damaged ({_said(error)}); {_another(option)}") from None


def _check_files(folder: Path, index: "Metadata", names: Container[str], option: str) -> None:
    """UserError unless every file with a chunk of the named tensors exists and reaches the chunk's last byte."""
    ends: dict[str, int] = {}
    for chunk, piece in index.storage_data.items():
        if chunk.fqn in names:
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing, one of {len(ends)} files of tensors; {_another(option)}")
        if (size := file.stat().st_size) < end:
            raise UserError(f"{file} is cut short: {size:,} bytes of at least {end:,}; {_another(option)}")


def _said(error: BaseException) -> str:
    """The error in one line; for a CheckpointException, its first failure."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
