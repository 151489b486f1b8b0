"""What the operating system grants a process is compared with what a run needs, and said before it starts."""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_txssm import process_limits
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training.launch.preflight import check_machine, number_of_shards

OWN_DATA = [
    *("data.corpus=null", "data.tokenizer_type=NullTokenizer", "data.vocab_size=64"),
    *("data.train=[[1.0, /data/a], [2.0, /data/b]]", "data.validation=/data/c"),
]


def test_the_soft_limit_of_open_files_becomes_the_hard_one() -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))
from megatron_txssm.process_limits import allow_open_files
allow_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "(512, 512)\n"


def test_a_shard_takes_no_more_files_than_is_reckoned_with(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_txssm.data.corpus.shard import write_shard

    def open_now() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    write_shard([[1, 2, 3]], tmp_path / "shard", 64, 63)
    before = open_now()
    shards = [IndexedDataset(str(tmp_path / "shard"), mmap=True) for _ in range(5)]
    # The others are those of Megatron's cache: document, sample and shuffle index.
    assert (open_now() - before) / len(shards) + 3 <= process_limits.FILES_A_SHARD


def test_too_many_shards_are_named_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    process_limits.check_open_files(640)
    with pytest.raises(UserError, match=r"1800 shards, .* up to 11056 files open, but the limit is 4096 \(ulimit -Hn"):
        process_limits.check_open_files(1800)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, resource.RLIM_INFINITY))
    process_limits.check_open_files(1800)


def test_shards_are_counted() -> None:
    assert number_of_shards(load_recipe("demo_cpu", OWN_DATA)) == 3


@pytest.mark.parametrize("length", [70, 71])
def test_a_temporary_folder_with_a_long_name(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "/tmp/" + "x" * (length - 5)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: folder)
    if length <= process_limits.LONGEST_TEMPORARY_FOLDER:
        process_limits.check_temporary_folder()
    else:
        with pytest.raises(UserError, match=rf"TMPDIR={folder} is 71 bytes long.*set TMPDIR to a shorter path"):
            process_limits.check_temporary_folder()


def test_helpers_find_room_for_their_sockets(tmp_path: Path) -> None:
    """The longest folder that is let through is short enough."""
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        folder = Path(parent) / ("x" * (process_limits.LONGEST_TEMPORARY_FOLDER - len(parent) - 1))
        folder.mkdir()
        script = "import multiprocessing\nif __name__ == '__main__':\n    print(multiprocessing.Manager().list([7]))\n"
        file = tmp_path / "manager.py"
        file.write_text(script)
        command = [sys.executable, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env={"TMPDIR": str(folder)}, timeout=600)
    assert done.stdout == "[7]\n", done.stderr


def test_little_shared_memory_is_named_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"/dev/shm has 0.0 MB left, but .* megatron.num_workers=0"):
        check_machine(load_recipe("demo_cpu", OWN_DATA), 2)
    check_machine(load_recipe("demo_cpu", [*OWN_DATA, "megatron.num_workers=0"]), 2)
