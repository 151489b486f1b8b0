"""Weights in a folder of safetensors, in any format of formats/mapping.py, read under Megatron's names.

Code in the folder is never executed: pickles are not opened, and modules beside the weights are not imported.
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_txssm.architecture.parameters import ModelSizes
from megatron_txssm.checkpoint.tensors import NamedTensors, Shape, compare_shapes, model_shapes
from megatron_txssm.convert.formats.config import REFERENCE_TYPE
from megatron_txssm.convert.formats.config_check import check_config
from megatron_txssm.convert.formats.config_recipe import recipe_of_config
from megatron_txssm.convert.formats.format import ARCHITECTURES, refusal
from megatron_txssm.convert.formats.mapping import Group, hf_tensors, plan
from megatron_txssm.errors import UserError
from megatron_txssm.files import JsonObject
from megatron_txssm.recipe.changes import without_prediction
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch

# A name that only one format has -> the format.
_SIGNS = {
    "embedding.word_embeddings.weight": "megatron",
    "model.word_embed.weight": "reference",
    "model.layers.0.shared_mlp.input_linear.weight": "granitemoehybrid",
}
# The embedding, in formats whose LM head is named lm_head.
_EMBEDDINGS = {"model.embed_tokens.weight", "model.word_embed.weight"}


class Entry(NamedTuple):
    """Where a tensor is stored, and how."""

    # Its file's name.
    file: str
    shape: Shape
    # safetensors' name of a dtype that is no plain floating-point type.
    dtype: "torch.dtype | str"


# Tensor -> its entry.
Index = dict[str, Entry]


@dataclass(frozen=True)
class HfFolder:
    """A folder of weights that match its recipe. See `tensors.Weights`."""

    folder: Path
    format: str
    recipe: Recipe
    index: Index

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        return model_shapes(self.recipe)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Megatron's tensor -> its group."""
        return {name: group for group in plan(self.format, self.shapes) for name in group.megatron}

    def dtype(self, name: str) -> "torch.dtype":
        dtype = self.index[self.groups[name].hf[0]].dtype
        assert not isinstance(dtype, str)
        return dtype

    def read(self, names: Iterable[str]) -> NamedTensors:
        """The named tensors; UserError if a file is damaged or holds values that our layers cannot express."""
        wanted, sizes = list(names), self.recipe.sizes
        result: NamedTensors = {}
        for group in dict.fromkeys(self.groups[name] for name in wanted):
            result |= self._convert(group, sizes)
        return {name: result[name] for name in wanted}

    def check_constants(self) -> None:
        """UserError unless tensors without a counterpart in Megatron hold their required values."""
        for group in plan(self.format, self.shapes):
            if not group.megatron:
                self._convert(group, self.recipe.sizes)

    def _convert(self, group: Group, sizes: ModelSizes) -> NamedTensors:
        tensors = {name: _read_tensor(self.folder / self.index[name].file, name) for name in group.hf}
        try:
            return group.from_hf(tensors, sizes)
        except ValueError as error:
            raise UserError(f"{self.folder}: {group.hf[0]} {error}") from None


def lacks_a_class(folder: Path) -> bool:
    """Whether transformers has no class for a folder's format: Megatron's or the authors' names."""
    file = folder / "config.json"
    return not file.is_file() or _read_json(file).get("model_type") == REFERENCE_TYPE


def is_hf_folder(path: Path) -> bool:
    """Whether a folder looks like exported weights, not like a run or its checkpoints."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json")
    # Path.is_file raises for overlong names.
    return any(os.path.isfile(path / name) for name in names)


def open_hf_folder(folder: Path, recipe: Recipe | None = None) -> HfFolder:
    """The weights of a folder that `recipe`, its recipe.yaml or its config.json describes; UserError for a mismatch."""
    index = _read_index(folder)
    config = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    format = next((format for sign, format in _SIGNS.items() if sign in index), None)
    format = format or config.get("model_type")
    if format not in (*ARCHITECTURES, *_SIGNS.values()):
        raise UserError(
            f"{folder} holds a model of type {format!r}; only {', '.join(ARCHITECTURES)} can be imported, "
            "and the layouts reference and megatron"
        )
    remedy = "name a recipe that describes this model with --recipe"
    if recipe is None and (folder / "recipe.yaml").is_file():
        recipe = load_recipe(folder / "recipe.yaml")
    elif recipe is None and config and format != "megatron":
        recipe, remedy = recipe_of_config(folder, config, format), "no recipe can describe such a model"
    elif recipe is None:
        raise UserError(f"{folder} has neither recipe.yaml nor config.json; {remedy}")
    recipe = without_prediction(recipe)
    if reason := refusal(recipe, format):
        raise UserError(f"{folder} has layout {format}, which cannot hold recipe {recipe.name}: {reason}; {remedy}")
    if format in ARCHITECTURES or (config and format == "reference"):
        check_config(folder, config, recipe, format, remedy)
    elif format == "reference":
        print(
            f"warning: {folder} has no config.json: that its rotary base, epsilon and heads are those of recipe "
            f"{recipe.name} cannot be checked",
            file=sys.stderr,
        )
    opened = HfFolder(folder, format, recipe, _without_leftovers(folder, index, recipe))
    sizes = recipe.sizes
    wanted = {name: tuple(t.shape) for name, t in hf_tensors(plan(format, opened.shapes), sizes).items()}
    if fault := compare_shapes({name: entry.shape for name, entry in opened.index.items()}, wanted):
        raise UserError(f"{folder} is not the model that recipe {recipe.name} describes: {fault}")
    for name, entry in opened.index.items():
        if isinstance(entry.dtype, str):
            raise UserError(f"{folder}: {name} is stored as {entry.dtype}; save the model as F32, BF16, F16 or F64")
    opened.check_constants()
    return opened


def _without_leftovers(folder: Path, index: Index, recipe: Recipe) -> Index:
    """Drop what transformers used to save with weights: rotary tables, and a tied embedding again as the LM head."""
    drop = {name for name in index if name.endswith("rotary_emb.inv_freq")}
    if recipe.model.tie_embeddings and "lm_head.weight" in index and (names := _EMBEDDINGS & index.keys()):
        _check_tied(folder, index, recipe, min(names))
        drop.add("lm_head.weight")
    return {name: entry for name, entry in index.items() if name not in drop}


def _check_tied(folder: Path, index: Index, recipe: Recipe, embedding: str) -> None:
    """UserError unless a tied model's LM head equals its embedding."""
    import torch

    head, rows = (_read_tensor(folder / index[name].file, name) for name in ("lm_head.weight", embedding))
    if not torch.equal(head, rows):
        raise UserError(
            f"{folder}: lm_head.weight holds other values than {embedding}, but recipe {recipe.name} has "
            "model.tie_embeddings: true; name a recipe that describes this model with --recipe"
        )


def _read_tensor(file: Path, name: str) -> "torch.Tensor":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stream:
            return stream.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); copy it again") from None


def _read_index(folder: Path) -> Index:
    """The tensors of a folder, from the headers of all files."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one that holds model.safetensors")
    several = folder / "model.safetensors.index.json"
    # transformers also prefers a single file.
    if (folder / "model.safetensors").is_file():
        files, weight_map = ["model.safetensors"], None
    elif several.is_file():
        stated = _read_json(several).get("weight_map")
        files_of = stated.items() if isinstance(stated, dict) else ()
        weight_map = {name: file for name, file in files_of if isinstance(file, str)}
        if weight_map != stated:
            raise UserError(f"{several} has no weight_map; copy it again")
        files = sorted(set(weight_map.values()))
        if strange := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
            raise UserError(f"{several} names {strange[0]!r}, which is no safetensors file in its own folder")
    else:
        pickled = next((file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)), None)
        why = f"; {pickled} is a pickle, which could run code: save it as safetensors" if pickled else ""
        raise UserError(f"{folder} has no model.safetensors{why}")
    index: Index = {}
    for file in files:
        index |= _read_header(folder / file)
    if weight_map is not None and (lost := [name for name in weight_map if name not in index]):
        raise UserError(f"{folder / weight_map[lost[0]]} does not hold {lost[0]}, which its index names; copy it again")
    return index


def _read_header(file: Path) -> Index:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file} is missing; copy it again")
    try:
        with safe_open(file, framework="pt") as stream:
            found: Index = {}
            for name in stream.keys():  # noqa: SIM118  (no dictionary)
                piece = stream.get_slice(name)
                found[name] = Entry(file.name, tuple(piece.get_shape()), _torch_dtype(piece.get_dtype()))
            return found
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error}); copy it again") from None


def _torch_dtype(name: str) -> "torch.dtype | str":
    """The dtype for safetensors' name; the name itself if it is not a plain floating-point type."""
    import torch

    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known.get(name, name)


def _read_json(file: Path) -> JsonObject:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is not what it should be: it holds a {type(found).__name__}; copy it again")
    return found
