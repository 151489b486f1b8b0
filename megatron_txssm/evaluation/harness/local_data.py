"""Data sets of the hub in a folder, for machines that do not reach it.

FOLDER/ORGANISATION/NAME/    the files of a data set, as on the hub; may also be put there by hand
FOLDER/fetched.json          data set -> its commit
FOLDER/nltk_data/            for RULER
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.suites import RULER
from megatron_txssm.evaluation.harness.tasks import MissingData, load_tasks, named_tasks
from megatron_txssm.files import write_results
from megatron_txssm.terminal import doing

_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_FETCHED = "fetched.json"


def fetch(folder: Path, tasks: Sequence[str]) -> int:
    """Download the data sets of these tasks into a folder, and load each from there; returns the exit code."""
    names = named_tasks(tasks)
    for name in names:
        if name in RULER:
            _fetch_nltk(folder)
        else:
            with doing(f"fetching the data of {name}"), data_from(folder, _download):
                load_tasks([name])
        print(f"{name}: {folder} has its data")
    return 0


def is_on_the_hub(path: str) -> bool:
    """Whether a task's `dataset_path` is a data set of the hub, not a folder or a kind of files such as "json"."""
    return _ON_THE_HUB.fullmatch(path) is not None and not os.path.isdir(path)


@contextmanager
def data_from(folder: Path | None, missing: Callable[[Path, str, str | None], None] | None = None) -> Iterator[None]:
    """Within the block, data sets of the hub are read from `folder` (None: as ever).

    `missing` is called with the folder, a data set that a task reads, and its configuration; None: MissingData where it
    is not there.
    """
    if folder is None:
        yield
        return
    if missing is None and not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder; `txssm eval fetch {folder} --tasks …` makes it")
    import datasets
    import nltk

    load_dataset: Any = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if not is_on_the_hub(path):
            return load_dataset(path, name, **options)
        if missing is not None:
            missing(folder, path, name)
        elif not (folder / path).is_dir():
            raise MissingData(folder, path)
        return load_dataset(str(folder / path), name, **options)

    nltk.data.path.insert(0, str(folder / "nltk_data"))
    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = load_dataset
        nltk.data.path.pop(0)


def fetched_commits(folder: Path | None) -> dict[str, str]:
    """Data set -> its commit on the hub, of those that `fetch` brought. UserError if the file is damaged."""
    if folder is None:
        return {}
    try:
        found = json.loads((folder / _FETCHED).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{folder / _FETCHED} is damaged; remove it, and repeat `txssm eval fetch`, which writes it")
    return found


def _download(folder: Path, name: str, config: str | None) -> None:
    """Download a data set's files, of which only those of a configuration if its card lists them."""
    from huggingface_hub import HfApi, snapshot_download

    place: dict[str, Any] = {"repo_type": "dataset", "local_dir": folder / name}
    try:
        info = HfApi().dataset_info(name)
        card = info.card_data.to_dict() if info.card_data else {}
        files = files_of(card, config)
        patterns = None if files is None else ["README.md", *files]
        snapshot_download(name, revision=info.sha, allow_patterns=patterns, **place)
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the data set {name} cannot be fetched ({type(error).__name__}: {reason}); use a machine that reaches the "
            "hub, or state a mirror in HF_ENDPOINT"
        ) from error
    write_results(folder / _FETCHED, fetched_commits(folder) | {name: info.sha})


def files_of(card: dict[str, Any], config: str | None) -> list[str] | None:
    """Patterns of a configuration's files, as a data set's card lists them; None: it does not."""
    configs = {each.get("config_name"): each for each in card.get("configs") or []}
    files = configs.get(config or "default", {}).get("data_files")
    if not files:
        return None
    if isinstance(files, str):
        files = [files]
    return [path for each in files for path in _listed(each if isinstance(each, str) else each["path"])]


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _fetch_nltk(folder: Path) -> None:
    import nltk

    if not nltk.download("punkt_tab", download_dir=str(folder / "nltk_data"), quiet=True):
        raise UserError("nltk's punkt_tab cannot be fetched; use a machine that reaches raw.githubusercontent.com")
