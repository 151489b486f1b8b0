"""A run whose checkpoint holds random weights, written by torch alone: no start of Megatron, no training."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_txssm.checkpoint.tensors import EMBEDDING, OUTPUT_LAYER, model_shapes
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from tests.convert.trained import ARCHITECTURES, Trained

# No tokens, no tokenizer.
_WITHOUT_DATA = ("data.corpus=null", "data.train=a", "data.validation=a", "data.tokenizer_type=NullTokenizer")


def make_run(folder: Path, model: dict[str, Any] | None = None) -> Path:
    """A run folder with two steps, 1 and 2, of 301 tokens and 3 rows of padding."""
    made = Trained("run", folder, 1, ARCHITECTURES["jamba"] if model is None else model, {}, 301)
    made.write_recipe()
    recipe = load_recipe(made.recipe, _WITHOUT_DATA)
    made.checkpoints.mkdir(parents=True)
    (made.checkpoints / "recipe.yaml").write_text(recipe.to_yaml())
    (made.checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    for step in (1, 2):
        # Two threads: two files.
        writer = FileSystemWriter(made.checkpoints / f"iter_{step:07d}", thread_count=2)
        with warnings.catch_warnings(action="ignore"):
            save(random_weights(recipe, seed=step), storage_writer=writer, no_dist=True)
    return made.run


def random_weights(recipe: Recipe, seed: int) -> dict[str, torch.Tensor]:
    """As Megatron names and pads them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(model_shapes(recipe))
    for name in {EMBEDDING, OUTPUT_LAYER} & shapes.keys():
        shapes[name] = (recipe.padded_vocab_size, *shapes[name][1:])
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)
