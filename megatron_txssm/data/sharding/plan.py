"""The tasks of a corpus: which slices of which source files each one reads.

The plan depends on the files' names and sizes alone, not on workers or machines, so any number of them gives the same
shards. It is written once: files that come later are not part of the corpus.
"""

import fnmatch
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_txssm.data.corpus.manifest import Plan, Slice, read_plan, write_plan
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus_recipe import KEPT_RECIPE, CorpusRecipe, SubsetSource
from megatron_txssm.recipe.corpus_tokenizer import read_tokenizer_facts

# Files that can be read, by their endings; only parquet can be read from the middle.
PARQUET_SUFFIXES = (".parquet", ".parq")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
# Of small files; a task's manifest names them all.
FILES_PER_TASK = 1000


def make_plan(recipe: CorpusRecipe) -> Plan:
    """The plan in the corpus directory; what it lacks is made from the sources' file listings."""
    before = read_plan(recipe.path).tasks if (recipe.path / "plan.json").exists() else {}
    new = {name: subset for name, subset in recipe.subsets.items() if name not in before}
    if not new:
        return Plan(before)
    plan = Plan(before | {name: plan_subset(name, subset, list_files(name, subset)) for name, subset in new.items()})
    write_plan(recipe.path, plan)
    return plan


def list_files(name: str, subset: SubsetSource) -> list[tuple[str, int]]:
    """(path relative to the source, bytes) of the files of a subset, in the order of their names."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, root = url_to_fs(subset.source)
        if isinstance(system, LocalFileSystem):
            found = dict(_local_files(Path(root)))
        else:
            listing: Any = system.find(root, detail=True)
            found = {path.removeprefix(root).lstrip("/"): int(facts["size"] or 0) for path, facts in listing.items()}
    except Exception as error:  # of many kinds: the network's, the hub's, the file system's
        raise UserError(f"subsets.{name}.source={subset.source} cannot be listed: {error}") from None
    # Checkpoints of editors, caches of downloads, what a Mac leaves in an archive.
    hidden = {path for path in found if any(part.startswith(".") for part in path.split("/"))}
    wanted = sorted(path for path in found.keys() - hidden if _matches(path, subset.glob))
    files = [path for path in wanted if path.endswith(PARQUET_SUFFIXES + JSONL_SUFFIXES)]
    if not files:
        other = f"; {len(wanted)} match {subset.glob!r}, such as {wanted[0]}" if wanted else ""
        other = other if any(found) else "; it is empty, or no folder"
        other += f"; {len(hidden)} are hidden and left out, such as {min(hidden)}" if hidden else ""
        raise UserError(
            f"subsets.{name}.source={subset.source} holds no {', '.join(PARQUET_SUFFIXES + JSONL_SUFFIXES)} file that "
            f"matches glob={subset.glob!r}{other}"
        )
    return [(path, found[path]) for path in files[: subset.max_files]]


def _local_files(root: Path) -> Iterator[tuple[str, int]]:
    """(path in the folder, bytes) of its files; those in linked folders, too, which fsspec leaves out."""
    if root.is_file():
        yield "", root.stat().st_size
    for folder, folders, files in os.walk(root, followlinks=True):
        # A link to a folder above would go on for ever.
        above = {os.path.realpath(folder), *map(str, Path(os.path.realpath(folder)).parents)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) not in above]
        for name in files:
            path = os.path.join(folder, name)
            # A link to nothing is an unreadable file for who reads it.
            yield os.path.relpath(path, root), os.stat(path).st_size if os.path.exists(path) else 0


def plan_subset(name: str, subset: SubsetSource, files: list[tuple[str, int]]) -> tuple[tuple[Slice, ...], ...]:
    """Tasks of about `task_bytes`: a larger parquet file makes several, small files share one."""
    tasks: list[tuple[Slice, ...]] = []
    shared: list[Slice] = []

    def close() -> None:
        if shared:
            tasks.append(tuple(shared))
            shared.clear()

    for path, size in files:
        parts = math.ceil(size / subset.task_bytes) if path.endswith(PARQUET_SUFFIXES) else 1
        if parts > 1:
            close()
            tasks += [(Slice(path, part, parts, size // parts),) for part in range(parts)]
            continue
        if sum(piece.bytes for piece in shared) + size > subset.task_bytes or len(shared) == FILES_PER_TASK:
            close()
        shared.append(Slice(path, 0, 1, size))
    close()
    # A task's number has five digits in its files' names.
    if len(tasks) >= 100_000:
        raise UserError(f"subsets.{name}.task_bytes={subset.task_bytes} makes {len(tasks):,} tasks; raise it")
    return tuple(tasks)


def freeze_recipe(recipe: CorpusRecipe) -> None:
    """Keep the recipe in the corpus; UserError where the corpus was begun under another that gives other files.

    Subsets may have come since.
    """
    from megatron_txssm.files import write_file_atomically
    from megatron_txssm.recipe.corpus_recipe import load_corpus_recipe

    kept = recipe.path / KEPT_RECIPE
    if kept.exists() and (recipe.path / "plan.json").exists():
        before = load_corpus_recipe(kept)
        # One that was added with a mistake, and did not come as far as the plan, may go again.
        planned = read_plan(recipe.path).tasks
        before = replace(before, subsets={name: before.subsets[name] for name in planned if name in before.subsets})
        differences = _differences(before, recipe)
        models = before.tokenizer.model, recipe.tokenizer.model
        if models[0] != models[1] and not _is_its_tokenizer(recipe):
            differences.append(f"tokenizer.model: {models[0]!r} there, {models[1]!r} here")
        if differences:
            raise UserError(
                f"{recipe.path} was begun with another recipe ({'; '.join(differences)}); "
                "only new subsets may be added: use another output, or remove the folder"
            )
    recipe.path.mkdir(parents=True, exist_ok=True)
    write_file_atomically(kept, recipe.to_yaml().encode())


def _is_its_tokenizer(recipe: CorpusRecipe) -> bool:
    """Whether the tokenizer that the recipe names, perhaps by another path, is the one that the corpus holds."""
    from megatron_txssm.data.tokenizer.install import install_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        return install_tokenizer(recipe.tokenizer, Path(folder)) == read_tokenizer_facts(recipe.path)


# Fields that change how a corpus is made, not what is in it.
_FREE = ("blob_threads", "max_broken_fraction", "max_broken_files", "blob_url", "source")


def _differences(there: CorpusRecipe, here: CorpusRecipe) -> list[str]:
    theirs, ours = _decisive(there), _decisive(here)
    gone = [f"subset {name!r} is missing" for name in there.subsets if name not in here.subsets]
    changed = [name for name in sorted(theirs) if name in ours and theirs[name] != ours[name]]
    return gone + [f"{name}: {theirs[name]!r} there, {ours[name]!r} here" for name in changed]


def _decisive(recipe: CorpusRecipe) -> dict[str, object]:
    fields = {
        f"subsets.{name}.{field}": value
        for name, subset in recipe.subsets.items()
        for field, value in vars(subset).items()
        if field not in _FREE
    }
    return fields | {"tokenizer.type": recipe.tokenizer.type, "tokenizer.eod_token": recipe.tokenizer.eod_token}


def _matches(path: str, glob: str) -> bool:
    # "**/x" is to match "x" as well; fnmatch's "*" also matches a slash.
    return fnmatch.fnmatch(path, glob) or (glob.startswith("**/") and fnmatch.fnmatch(path, glob[3:]))
