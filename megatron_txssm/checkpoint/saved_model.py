"""The weights of one of Megatron's checkpoints: whole tensors by name, read without a GPU or a model.

A checkpoint (torch_dist) holds a tensor in chunks, as the ranks had it; reading puts them together.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_txssm.checkpoint.checksums import verify_files, wrong_sizes
from megatron_txssm.checkpoint.steps import TRACKER, check_tracker, tracked
from megatron_txssm.checkpoint.tensors import EMBEDDING, OUTPUT_LAYER, Shape, compare_shapes, model_shapes
from megatron_txssm.errors import UserError, nearest
from megatron_txssm.recipe.loader import load_recipe, recipe_names
from megatron_txssm.recipe.recipe import Recipe


@dataclass(frozen=True)
class SavedModel:
    """The weights of one checkpoint, whose files are all there. See `tensors.Weights`."""

    # The run's checkpoints, and the folder of this step among them.
    checkpoints: Path
    folder: Path
    step: int
    recipe: Recipe
    # Without padding, in the order of the model's layers.
    shapes: dict[str, Shape]
    # Name -> torch's TensorStorageMetadata: whole size, dtype, chunks; and the whole index that they are from.
    entries: Mapping[str, Any]
    index: Any
    # The command line's, by which another step is chosen.
    option: str = "--step"

    def dtype(self, name: str) -> Any:
        return self.entries[name].properties.dtype

    def read(self, names: Iterable[str]) -> dict[str, Any]:
        """Name -> whole tensor, without the vocabulary's padding; UserError where a file is damaged."""
        import torch

        tensors = {name: torch.empty(self.entries[name].size, dtype=self.dtype(name)) for name in names}
        _load(self.folder, self.index, tensors, self.option)
        rows = {name: self.shapes[name][0] for name in tensors}
        return {name: t if len(t) == rows[name] else t[: rows[name]].clone() for name, t in tensors.items()}


def find_checkpoints(path: Path) -> Path:
    """The checkpoints folder of a run folder, or `path` where it is one; UserError where there is no checkpoint."""
    # Path.exists would raise for a name that is too long.
    if not os.path.exists(path):
        raise UserError(f"{path}: no such folder; {how_to_make(path)}")
    candidates = [path, path / "checkpoints"]
    # Only where it is stated: a copied run's recipe still names the old place.
    if (path / "recipe.yaml").is_file() and (stated := load_recipe(path / "recipe.yaml").checkpoint.directory):
        candidates.append(Path(stated))
    for folder in candidates:
        if tracked(folder) is not None:
            return folder
        check_tracker(folder)
    raise UserError(f"{path} holds no checkpoint; name a run's folder or its checkpoints, such as runs/demo")


def how_to_make(path: Path) -> str:
    """A remedy where a run's folder, or an export, is not there: the neighbour that may be meant, or the command."""
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

    `option` chose the step. `recipe`: what trained it, else the recipe.yaml beside the checkpoints.
    """
    checkpoints = find_checkpoints(path)
    made_by = checkpoints / "recipe.yaml"
    if recipe is None and not made_by.is_file():
        raise UserError(
            f"{checkpoints} has no recipe.yaml, which `txssm pretrain` writes and stock Megatron-LM does not: copy the "
            "recipe that trained it there; `txssm convert export` takes it as --recipe"
        )
    described = f"{made_by} describes" if recipe is None else f"recipe {recipe.name} describes"
    recipe = recipe or load_recipe(made_by)
    step, folder = step_folder(checkpoints, step, option)
    index = _read_index(folder, option)
    entries = {name: entry for name, entry in index.state_dict_metadata.items() if _is_weight(name, entry)}
    _check_files(folder, index.storage_data, entries, option)
    shapes = model_shapes(recipe)
    if fault := compare_shapes({name: _without_padding(recipe, name, e) for name, e in entries.items()}, shapes):
        raise UserError(f"{folder} is not the model that {described}: {fault}; {_another(option)}")
    verify_files(folder, recipe.checkpoint.verify, turn=step)
    return SavedModel(checkpoints, folder, step, recipe, shapes, entries, index, option)


def _another(option: str) -> str:
    return f"copy it again, or take another step with {option}"


def damage_of_newest(checkpoints: Path) -> str:
    """What is missing of a run's newest checkpoint, optimizer state included; empty where every file is whole."""
    try:
        _, folder = step_folder(checkpoints, None)
    except UserError as error:
        return str(error)
    return wrong_sizes(folder) or damage_by_index(folder)


def damage_by_index(folder: Path) -> str:
    """The first file of a checkpoint that ends before what the index says is in it; empty where none does."""
    try:
        index = _read_index(folder, "--step")
        _check_files(folder, index.storage_data, index.state_dict_metadata, "--step")
    except UserError as error:
        return str(error).removesuffix(f"; {_another('--step')}")
    return ""


def read_weights(folder: Path, at_once: int = 1 << 30) -> Iterator[tuple[str, Any]]:
    """Name and whole tensor of every weight of a checkpoint, `at_once` bytes at a time; UserError where it is damaged.

    Which model it is need not be known.
    """
    import torch

    index = _read_index(folder, "--step")
    entries = {name: entry for name, entry in index.state_dict_metadata.items() if _is_weight(name, entry)}
    _check_files(folder, index.storage_data, entries, "--step")
    batch: dict[str, Any] = {}
    for number, (name, entry) in enumerate(entries.items(), 1):
        batch[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        if number == len(entries) or sum(tensor.nbytes for tensor in batch.values()) >= at_once:
            _load(folder, index, batch, "--step")
            yield from batch.items()
            batch = {}


def _load(folder: Path, index: Any, tensors: dict[str, Any], option: str) -> None:
    """Fill the tensors of these names; UserError where a file is damaged."""
    from torch.distributed.checkpoint import CheckpointException, load

    from megatron_txssm.checkpoint.torch_dist import IndexReader

    try:
        # It says that it reads in one process, which is what it was asked for.
        with warnings.catch_warnings(action="ignore"):
            load(tensors, storage_reader=IndexReader(folder, index), no_dist=True)
    # torch's CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:
        raise UserError(f"{folder} is damaged ({_said(error)}); {_another(option)}") from None


def _without_padding(recipe: Recipe, name: str, entry: Any) -> Shape:
    rows, *rest = entry.size
    return (min(rows, recipe.data.vocab_size) if name in (EMBEDDING, OUTPUT_LAYER) else rows, *rest)


def _is_weight(name: str, entry: Any) -> bool:
    """Neither optimizer state nor what Megatron saves as bytes, without a size (random states, `_extra_state`)."""
    return hasattr(entry, "size") and "optimizer" not in name.split(".")


def step_folder(checkpoints: Path, step: int | None, option: str = "--step") -> tuple[int, Path]:
    """(step, its folder) of a run's checkpoints, the newest for None; UserError with the steps that there are."""
    named = TRACKER if step is None else f"{option} {step}"
    newest = tracked(checkpoints)
    # A `release` counts as step 0. Megatron goes by the tracker, too.
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


def _read_index(folder: Path, option: str) -> Any:
    """torch's Metadata of a torch_dist checkpoint."""
    from megatron_txssm.checkpoint.torch_dist import IndexReader

    if not (folder / ".metadata").is_file():
        raise UserError(f"{folder} is no whole torch_dist checkpoint: it has no .metadata; {_another(option)}")
    try:
        return IndexReader(folder).read_metadata()
    except Exception as error:  # whatever the damage makes pickle raise
        raise UserError(f"{folder / '.metadata'} is damaged ({_said(error)}); {_another(option)}") from None


def _check_files(folder: Path, storage: Mapping[Any, Any], tensors: Mapping[str, Any], option: str) -> None:
    """UserError unless every file that holds a piece of `tensors` is there, up to the piece's last byte."""
    ends: dict[str, int] = {}
    for index, piece in storage.items():
        if index.fqn in tensors:
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing, one of {len(ends)} files of tensors; {_another(option)}")
        if (size := file.stat().st_size) < end:
            raise UserError(f"{file} is cut short: {size:,} bytes of at least {end:,}; {_another(option)}")


def _said(error: BaseException) -> str:
    """What went wrong in one line; of a CheckpointException, what went wrong first."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
