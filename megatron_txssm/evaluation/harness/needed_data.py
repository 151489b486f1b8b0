"""Which data sets of the hub tasks read, by their files of lm_eval's: no data are loaded, and no task's code is run."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.local_data import files_of, is_on_the_hub
from megatron_txssm.evaluation.harness.suites import RULER
from megatron_txssm.evaluation.harness.tasks import check_names, task_manager, unusable
from megatron_txssm.recipe.settings.paths import is_task_file
from megatron_txssm.terminal import doing

# Fields of a task that say which data it reads; a group's are those of its members, too.
_OF_DATA = ("dataset_path", "dataset_name", "custom_dataset")
# The card of a data set begins with its facts.
_CARD = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


class DataSet(NamedTuple):
    """A data set of the hub, and the configuration that a task reads; None: the default."""

    name: str
    config: str | None

    def __str__(self) -> str:
        return self.name if self.config is None else f"{self.name} ({self.config})"


def check_tasks(names: Sequence[str], data: Path | None) -> None:
    """UserError if lm_eval has no task of a name, or, with the command that mends it, if `data` lacks a data set.

    names: as of `tasks.named_tasks`. A data set is there if its folder has files: those of the configuration, if its
    card lists them. What only the code of a task names is not checked.
    """
    if data is None:
        check_names(names)
        return
    with doing("looking for the tasks and their data"):
        index: Mapping[str, Any] = task_manager([name for name in names if name not in RULER]).task_index
        lacking = {name: missing for name in names if (missing := [*_missing(name, index, data)])}
    if lacking:
        name, (first, *_) = next(iter(lacking.items()))
        others = len({each for missing in lacking.values() for each in missing}) - 1
        more = f" and {others} more" if others else ""
        raise UserError(
            f"--data {data}: task {name} reads {first}{more}, which it does not have; on a machine that reaches the "
            f"hub, use `txssm eval fetch {shlex.quote(str(data))} --tasks {shlex.join(lacking)}`"
        )


def _missing(name: str, index: Mapping[str, Any], data: Path) -> Iterator[str]:
    if name in RULER:
        if not _has_sentences(data):
            yield "nltk's punkt_tab"
        return
    for found in data_sets(name, index):
        if not _is_in(data, found):
            yield str(found)


def data_sets(name: str, index: Mapping[str, Any]) -> Iterator[DataSet]:
    """What a task, group, tag or file of tasks reads from the hub; `index`: of lm_eval's TaskManager.

    UserError if it is a file that lm_eval cannot read.
    """
    if is_task_file(name):
        configs = _read(name, index)
    else:
        configs = _of_entry(name, index, {})
    for config in configs:
        path = config.get("dataset_path")
        # A function makes the data of a task that has one.
        if isinstance(path, str) and not config.get("custom_dataset") and is_on_the_hub(path):
            yield DataSet(path, config.get("dataset_name"))


def _read(file: str, index: Mapping[str, Any]) -> list[dict[str, Any]]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return [*_of_config(load_yaml(file, resolve_func=False), index, {})]
    except Exception as error:  # the user's mistakes in it are of many kinds
        raise unusable(file, error) from error


def _of_entry(name: str, index: Mapping[str, Any], changes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    entry = index[name]
    if entry.cfg is None:
        # A tag.
        for member in sorted(entry.tags & index.keys()):
            yield from _of_entry(member, index, changes)
    else:
        yield from _of_config(entry.cfg, index, changes)


def _of_config(
    config: Mapping[str, Any], index: Mapping[str, Any], changes: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The configurations of the tasks in a file; `changes`: of the group that it is a member of."""
    config = {**config, **changes}
    members = config.get("task")
    if "class" in config:
        # Python code of lm_eval's, which names its data itself.
        return
    if not isinstance(members, list):
        yield config
        return
    own = {field: config[field] for field in _OF_DATA if field in config}
    for member in members:
        stated: dict[str, Any] = {"task": member} if isinstance(member, str) else member
        name = stated.get("group") or stated["task"]
        if isinstance(name, str) and name in index:
            changed = own | {field: stated[field] for field in _OF_DATA if field in stated}
            yield from _of_entry(name, index, changed)
        else:
            yield from _of_config(stated, index, own)


def _is_in(data: Path, wanted: DataSet) -> bool:
    folder = data / wanted.name
    try:
        patterns = files_of(_card(folder), wanted.config)
    except (AttributeError, KeyError, TypeError):
        # A card that is wrong; the files may be right.
        patterns = None
    return all(_has(folder, pattern) for pattern in patterns or ["**/*"])


def _has(folder: Path, pattern: str) -> bool:
    """Whether a file is there, apart from the card and what the hub's client keeps for itself."""
    try:
        found = [file.relative_to(folder) for file in folder.glob(pattern) if file.is_file()]
    except (ValueError, NotImplementedError):
        # An address, or a pattern that only the hub knows.
        return True
    return any(file.name != "README.md" and not any(part.startswith(".") for part in file.parts) for file in found)


def _card(folder: Path) -> dict[str, Any]:
    """The facts at the beginning of a data set's README.md; empty if there are none."""
    try:
        found = _CARD.match((folder / "README.md").read_text(encoding="utf-8"))
        facts = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _has_sentences(data: Path) -> bool:
    """Whether nltk finds what RULER cuts its texts into sentences with."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab", [str(data / "nltk_data"), *nltk.data.path])
    except LookupError:
        return False
    return True
