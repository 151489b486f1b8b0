"""Plans the tasks of a corpus: the slices of source files that each one reads.

The plan depends only on the files' names and sizes, not on workers or machines, so any number of them gives the same
shards. It is written once: files added later are not part of the corpus.
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
from megatron_txssm.recipe.corpus.schema import KEPT_RECIPE, CorpusRecipe, SubsetSource
from megatron_txssm.recipe.corpus.tokenizer import read_tokenizer_facts

# Suffixes of readable files; only parquet can be read from the middle.
PARQUET_SUFFIXES = (".parquet", ".parq")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
# Maximum number of small files in a task, whose manifest names them all.
FILES_PER_TASK = 1000


def make_plan(recipe: CorpusRecipe) -> Plan:
    """The plan in the corpus directory; missing subsets are planned from their sources' file listings."""
    before = read_plan(recipe.path).tasks if (recipe.path / "plan.json").exists() else {}
    new = {name: subset for name, subset in recipe.subsets.items() if name not in before}
    if not new:
        return Plan(before)
    plan = Plan(before | {name: plan_subset(name, subset, list_files(name, subset)) for name, subset in new.items()})
    write_plan(recipe.path, plan)
    return plan


def check_local_sources(recipe: CorpusRecipe) -> None:
    """UserError if a folder of this machine, from which the plan is still to be made, holds no texts; only reads."""
    before = read_plan(recipe.path).tasks if (recipe.path / "plan.json").exists() else {}
    for name, subset in recipe.subsets.items():
        # Others take a network, and minutes.
        if name not in before and "://" not in subset.source:
            list_files(name, subset)


def list_files(name: str, subset: SubsetSource) -> list[tuple[str, int]]:
    """(path relative to the source, bytes) of the files of a subset, sorted by name."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, root = url_to_fs(subset.source)
        if isinstance(system, LocalFileSystem):
            found = dict(_local_files(Path(root)))
        else:
            listing: Any = system.find(root, detail=True)
            found = {path.removeprefix(root).lstrip("/"): int(facts["size"] or 0) for path, facts in listing.items()}
    except Exception as error:  # many kinds: of the network, the hub, the file system
        raise UserError(f"subsets.{name}.source={subset.source} cannot be listed: {error}") from None
    # Checkpoints of editors, caches of downloads, files that macOS adds to archives.
    hidden = {path for path in found if any(part.startswith(".") for part in path.split("/"))}
    wanted = sorted(path for path in found.keys() - hidden if _matches(path, subset.glob))
    files = [path for path in wanted if path.endswith(PARQUET_SUFFIXES + JSONL_SUFFIXES)]
    if not files:
        other = f"; {len(wanted)} match {subset.glob!r}, such as {wanted[0]}" if wanted else ""
        other = other if any(found) else "; it is empty, or not a folder"
        other += f"; {len(hidden)} are hidden and ignored, such as {min(hidden)}" if hidden else ""
        raise UserError(
            f"subsets.{name}.source={subset.source} holds no {', '.join(PARQUET_SUFFIXES + JSONL_SUFFIXES)} file that "
            f"matches glob={subset.glob!r}{other}"
        )
    return [(path, found[path]) for path in files[: subset.max_files]]


def _local_files(root: Path) -> Iterator[tuple[str, int]]:
    """(path in the folder, bytes) of a folder's files, including those in linked folders, which fsspec skips."""
    if root.is_file():
        yield "", root.stat().st_size
    for folder, folders, files in os.walk(root, followlinks=True):
        # A link to a folder above would recurse forever.
        above = {os.path.realpath(folder), *map(str, Path(os.path.realpath(folder)).parents)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) not in above]
        for name in files:
            path = os.path.join(folder, name)
            # A dangling link is listed, and reported as unreadable by its reader.
            yield os.path.relpath(path, root), os.stat(path).st_size if os.path.exists(path) else 0


def plan_subset(name: str, subset: SubsetSource, files: list[tuple[str, int]]) -> tuple[tuple[Slice, ...], ...]:
    """Tasks of about `task_bytes`: a larger parquet file gives several tasks, small files share one."""
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
    """Store the recipe in the corpus; UserError if the corpus was begun with one that gives other files.

    Subsets may have been added since.
    """
    from megatron_txssm.files import write_file_atomically
    from megatron_txssm.recipe.corpus.loader import load_corpus_recipe

    kept = recipe.path / KEPT_RECIPE
    if kept.exists() and (recipe.path / "plan.json").exists():
        before = load_corpus_recipe(kept)
        # A subset that was added with a mistake and is not in the plan may be removed again.
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
    """Whether the recipe's tokenizer, perhaps at another path, is the one in the corpus."""
    from megatron_txssm.data.tokenizer.install import install_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        return install_tokenizer(recipe.tokenizer, Path(folder)) == read_tokenizer_facts(recipe.path)


# Fields that change how a corpus is made, not its contents.
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
    # "**/x" must match "x" as well; fnmatch's "*" also matches a slash.
    return fnmatch.fnmatch(path, glob) or (glob.startswith("**/") and fnmatch.fnmatch(path, glob[3:]))
