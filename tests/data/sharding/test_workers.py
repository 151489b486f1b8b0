"""The processes of local tasks, where the machine has no room for what they share."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.data.corpus.manifest import Plan
from megatron_txssm.data.sharding import run_local
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from tests.data.in_process import web_recipe


def test_without_room_for_shared_memory_the_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_local, "unfinished", lambda *_: [0])
    monkeypatch.setattr(run_local, "start_worker_server", lambda: None)
    monkeypatch.setattr(run_local, "ProcessPoolExecutor", full)
    (tmp_path / "source").mkdir()
    recipe = load_corpus_recipe(web_recipe(tmp_path, tmp_path / "source"))
    with pytest.raises(UserError, match=r"/dev/shm: No space left on device; .* make room"):
        run_local.run_locally(recipe, Plan({}), 1)
