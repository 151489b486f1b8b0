"""The study of position encodings (table 2 of arXiv:2506.09507): seven models of one size on the same tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.paper import TABLE_2
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.studies.conduct import Study
from megatron_txssm.studies.data import corpus_overrides
from megatron_txssm.studies.study import check_comparable
from megatron_txssm.studies.summary import show_comparison

NAME = "position-encoding"
REFERENCE = "hybrid_rope"


def position_encoding(
    preset: str = "small",
    *,
    folder: Path | None = None,
    corpus: str | None = None,
    overrides: Sequence[str] = (),
    command: str = "",
) -> Study:
    """The study of table 2's seven models.

    Args:
        preset: a name in data.PRESETS; the hybrid's recipe is position_encoding_PRESET
        folder: the study's; default: runs/studies/position-encoding-PRESET
        corpus: directory or recipe of the corpus to train on; default: the preset's, which is made for "small" if it is
            not there: the standard library of this Python, 10 MB
        overrides: changed fields of all recipes, as "a.b=c"
        command: the command that conducts it, for its results
    """
    return Study(
        name=NAME,
        folder=folder or default_folder(preset),
        variants=variants(preset, [*corpus_overrides(preset, corpus, overrides), *overrides]),
        check=partial(check_comparable, varied=("model.layer_pattern", "model.position_encoding")),
        show=show,
        facts={"preset": preset, "command": command},
    )


def show(folder: Path) -> None:
    """Print table 2 as far as it is finished, and write results.json and results.png."""
    show_comparison(folder, list(TABLE_2), REFERENCE, TABLE_2)


def default_folder(preset: str) -> Path:
    return Path("runs", "studies", f"{NAME}-{preset}")


def variants(preset: str, overrides: Sequence[str]) -> dict[str, Recipe]:
    """The seven recipes by name, in table 2's order, with changed fields of all."""
    hybrid = load_recipe(f"position_encoding_{preset}", overrides)
    if not (hybrid.has_attention and hybrid.has_state_space):
        raise UserError(
            f"model.layer_pattern={hybrid.model.layer_pattern} is the hybrid's: it needs attention (*) and state-space "
            "layers (M)"
        )
    found = {name: changed(hybrid, _changes(name, hybrid.model.layer_pattern)) for name in TABLE_2}
    for recipe in found.values():
        validate(recipe)
    return found


def _changes(name: str, pattern: str) -> Changes:
    """Of the hybrid's recipe, for a variant such as "state_space_a_t"."""
    layers = {"attention": pattern.replace("M", "*"), "state_space": pattern.replace("*", "M"), "hybrid": pattern}
    modules = next(modules for modules in layers if name.startswith(modules))
    return {"model.layer_pattern": layers[modules], "model.position_encoding": name.removeprefix(f"{modules}_")}
