"""Prints the tokens and epochs that a training draws from each subset, or Megatron's arguments for that."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.data.corpus.blend import CorpusBlend, Share, Stage, blend_corpus, corpus_arguments, recipe_blend
from megatron_txssm.data.corpus.manifest import open_corpus, read_plan
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.settings.setting import argument

if TYPE_CHECKING:
    from rich.table import Table

# Up to four epochs, repeated tokens are worth nearly as much as new ones (arXiv:2305.16264).
EPOCHS_OF_USE = 4


def show_blend(
    source: str | Path, *, tokens: int | None = None, overrides: Sequence[str] = (), megatron_args: bool = False
) -> int:
    """Print the blend of a recipe, or of a corpus directory in proportion to its tokens; returns the exit code.

    tokens: training tokens (None: the recipe's; for a directory, all once). overrides: recipe fields to change, as
    "a.b=c". megatron_args: print Megatron's arguments instead of the table.
    """
    # A recipe may share its name with a folder, but only a corpus has a plan.
    if (Path(source) / "plan.json").is_file():
        if overrides:
            raise UserError(f"--set {overrides[0]}: {source} is a corpus, not a recipe; name a recipe instead")
        blend = _directory_blend(source, tokens)
        words = _path_arguments(blend)
    else:
        length = [] if tokens is None else [f"training.train_tokens={tokens}"]
        recipe = load_recipe(source, [*overrides, *length])
        if recipe.data.corpus is None:
            raise UserError(f"{recipe.name} names its token files itself; data blend needs a recipe with data.corpus")
        if not megatron_args and not (Path(recipe.data.corpus) / "plan.json").exists() and _weights(recipe):
            return _print_weights(recipe)
        blend, words = recipe_blend(recipe), corpus_arguments(recipe)
    if megatron_args:
        print(shlex.join(words))
    else:
        _print_table(blend)
    _warn_of_repetition(blend)
    return 0


def _weights(recipe: Recipe) -> list[Mapping[str, float]]:
    """The weights of each stage, if the recipe states them."""
    if recipe.data.stages is not None:
        return [stage["weights"] for stage in recipe.data.stages]
    return [] if recipe.data.weights is None else [recipe.data.weights]


def _print_weights(recipe: Recipe) -> int:
    """Print what would be drawn from a corpus that does not exist yet."""
    steps = [recipe.train_iters] if recipe.data.stages is None else recipe.stage_iters
    for number, (weights, iters) in enumerate(zip(_weights(recipe), steps, strict=True), start=1):
        tokens, total = iters * recipe.training.global_batch_tokens, sum(weights.values())
        stage = "" if recipe.data.stages is None else f"stage {number}, "
        print(f"{stage}{tokens:,} tokens:")
        for name, weight in weights.items():
            print(f"  {name:20} {weight / total:.4f} {tokens * weight / total:>20,.0f}")
    try:
        read_plan(recipe.data.corpus or "")
    except UserError as error:
        print(f"the numbers of epochs are known once the corpus exists: {error}")
    return 0


def _directory_blend(directory: str | Path, tokens: int | None) -> CorpusBlend:
    corpus = open_corpus(directory)
    return blend_corpus(corpus, tokens or sum(subset.tokens("train") for subset in corpus.subsets.values()))


def _path_arguments(blend: CorpusBlend) -> list[str]:
    words = argument("--train-data-path", blend.megatron_blend("train"))
    if validation := blend.megatron_blend("validation"):
        words += argument("--valid-data-path", validation)
    return words


def _print_table(blend: CorpusBlend) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("stage", "subset"):
        table.add_column(column, no_wrap=True)
    for column in ("weight", "tokens available", "tokens drawn", "epochs"):
        table.add_column(column, justify="right", no_wrap=True)
    if len(blend.stages) > 1:
        for number, stage in enumerate(blend.stages, start=1):
            _add_rows(table, str(number), stage, blend.shares(stage))
    _add_rows(table, "all", blend.average, blend.shares(blend.average))
    Console(markup=False, width=240).print(table)


def _warn_of_repetition(blend: CorpusBlend) -> None:
    for share in blend.shares(blend.average):
        if share.epochs > EPOCHS_OF_USE:
            print(
                f"warning: {share.subset} is read {share.epochs:.1f} times; beyond {EPOCHS_OF_USE}, repeated tokens "
                "teach less and less (arXiv:2305.16264): lower its weight or the number of tokens",
                file=sys.stderr,
            )


def _add_rows(table: "Table", stage: str, part: Stage, shares: Sequence[Share]) -> None:
    for position, share in enumerate(shares):
        table.add_row(
            stage if position == 0 else "",
            share.subset,
            f"{share.weight:.4f}",
            f"{share.available:,}",
            f"{share.drawn:,.0f}",
            f"{share.epochs:.2f}",
        )
    table.add_row("", "", "", "", f"{part.tokens:,}", "")
