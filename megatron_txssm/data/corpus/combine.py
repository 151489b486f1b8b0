"""Makes one corpus of several finished ones without copying their shards.

It has its own manifest for every task, and a relative link for each of the task's files. Writing to it, such as redoing
a task or building Megatron's indices, therefore never changes the original corpora.
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.data.corpus.manifest import (
    SHARD_SUFFIXES,
    Corpus,
    Plan,
    Subset,
    manifest_path,
    open_corpus,
    read_plan,
    write_plan,
    write_subset_manifest,
)
from megatron_txssm.data.tokenizer.install import check_tokenizer
from megatron_txssm.errors import UserError
from megatron_txssm.files import check_absent, complete_folder, write_file_atomically, write_json
from megatron_txssm.recipe.corpus.checks import check_corpus_recipe
from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from megatron_txssm.recipe.corpus.schema import KEPT_RECIPE, CorpusRecipe
from megatron_txssm.terminal import print_table

# Upper estimate of a task's files that are not linked, to check the free disk space.
_BYTES_PER_TASK = 10_000


@dataclass(frozen=True)
class Source:
    """A corpus to combine."""

    directory: Path
    # Its subsets are renamed to PREFIX-SUBSET; None keeps their names.
    prefix: str | None = None

    def name(self, subset: str) -> str:
        return subset if self.prefix is None else f"{self.prefix}-{subset}"


def combine_corpora(out: str | Path, sources: Sequence[Source]) -> int:
    """Make one corpus of two or more finished ones, and print its contents; returns the exit code.

    UserError if they do not fit together or are unfinished.
    """
    if len(sources) < 2:
        raise UserError(f"only one corpus, {sources[0].directory}, is given; name two or more to combine")
    corpus = combine(Path(out), sources)
    rows = [
        (name, f"{len(s.manifests):,}", f"{s.tokens('train'):,}", f"{s.tokens('validation'):,}")
        for name, s in corpus.subsets.items()
    ]
    print_table(("subset", ">tasks", ">tokens", ">held out"), rows)
    originals = ", ".join(dict.fromkeys(str(source.directory) for source in sources))
    print(f"{corpus.directory} links to {originals}, which must not be removed")
    return 0


def combine(out: Path, sources: Sequence[Source]) -> Corpus:
    """Make a corpus with the subsets of all of `sources`; UserError if they do not fit together or are unfinished."""
    check_absent(out)
    corpora = [(source, open_corpus(source.directory)) for source in sources]
    _check_names(corpora)
    _check_tokenizers([corpus for _, corpus in corpora])
    recipe = _recipe(out, sources)
    plan = Plan(
        {
            source.name(subset): tasks
            for source in sources
            for subset, tasks in read_plan(source.directory).tasks.items()
        }
    )
    with complete_folder(out, _BYTES_PER_TASK * sum(map(len, plan.tasks.values()))) as folder:
        write_file_atomically(folder / KEPT_RECIPE, recipe.to_yaml().encode())
        _copy_tokenizer(sources[0].directory, folder)
        for source, corpus in corpora:
            for subset in corpus.subsets.values():
                _link_subset(subset, folder, source.name(subset.name))
        write_plan(folder, plan)
        for name in plan.tasks:
            write_subset_manifest(folder, name)
    return open_corpus(out)


def _check_names(corpora: Sequence[tuple[Source, Corpus]]) -> None:
    owners: dict[str, Path] = {}
    for source, corpus in corpora:
        for name in map(source.name, corpus.subsets):
            if name in owners:
                raise UserError(
                    f"subset {name} is in both {owners[name]} and {source.directory}; give one of them a prefix: "
                    f"{source.directory}=NAME makes it NAME-{name}"
                )
            owners[name] = source.directory


def _check_tokenizers(corpora: Sequence[Corpus]) -> None:
    first = corpora[0]
    for corpus in corpora:
        check_tokenizer(corpus.directory)
        theirs, ours = vars(first.tokenizer), vars(corpus.tokenizer)
        if different := [name for name in ours if ours[name] != theirs[name]]:
            facts = "; ".join(f"{name} {theirs[name]} and {ours[name]}" for name in different)
            raise UserError(
                f"{first.directory} and {corpus.directory} were made with different tokenizers ({facts}); "
                "shard one of them again with the other's"
            )


def _recipe(out: Path, sources: Sequence[Source]) -> CorpusRecipe:
    """The recipe with all subsets; the tokenizer and Slurm's options are those of the first corpus."""
    recipes = [load_corpus_recipe(source.directory / KEPT_RECIPE) for source in sources]
    subsets = {
        source.name(name): subset
        for source, recipe in zip(sources, recipes, strict=True)
        # A subset that was added to the recipe may be missing in the plan.
        for name, subset in recipe.subsets.items()
        if name in read_plan(source.directory).tasks
    }
    description = f"combined of {', '.join(recipe.name for recipe in recipes)}"
    recipe = dataclasses.replace(recipes[0], name=out.name, description=description, output=str(out), subsets=subsets)
    check_corpus_recipe(recipe)
    return recipe


def _copy_tokenizer(source: Path, folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    for path in sorted((source / "tokenizer").iterdir()):
        if path.is_file() and path.suffix != ".partial":
            # Without the permissions: the original may be read-only.
            shutil.copyfile(path, folder / "tokenizer" / path.name)


def _link_subset(subset: Subset, folder: Path, name: str) -> None:
    (folder / name).mkdir()
    # Where the links will be: beside `folder`, at the same depth.
    here = os.path.realpath(folder / name)
    for split in {split for manifest in subset.manifests for split in manifest.shards}:
        for prefix, _ in subset.shards(split):
            for suffix in SHARD_SUFFIXES:
                # Link to the file itself, so that a combined corpus may be combined again, then removed.
                target = os.path.realpath(f"{prefix}{suffix}")
                os.symlink(os.path.relpath(target, here), folder / name / f"{Path(prefix).name}{suffix}")
    for manifest in subset.manifests:
        renamed = dataclasses.replace(manifest, subset=name)
        write_json(manifest_path(folder, name, manifest.task), dataclasses.asdict(renamed))
