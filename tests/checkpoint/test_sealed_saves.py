"""A save that is killed at any of its steps leaves the newest checkpoint loadable, and never a broken one as newest."""

import functools
import io
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_txssm.checkpoint import compat_saves
from megatron_txssm.checkpoint.checksums import read_checksums, verify_files
from megatron_txssm.checkpoint.steps import TRACKER, Step, find_newest, interrupted_saves, remove_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def in_a_process(work: Callable[..., None], *args: Any) -> int:
    """Exit code of `work` in a fork of this process."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    process.join(600)
    assert process.exitcode is not None
    return process.exitcode


def save(checkpoints: Path, steps: range, kill_at: int | None, sealed: str) -> None:
    """Save these steps as Megatron does, as the only rank; at its `kill_at`-th touch of the folder the rank is killed.

    `sealed` is where the number of touches is written.
    """
    from megatron_txssm.platform import prepare_platform

    prepare_platform()
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from megatron.training import checkpointing

    rendezvous = checkpoints / f".rendezvous{os.getpid()}"
    # This process's own: one that another test has made does not live on in a fork.
    dist.distributed_c10d._update_default_pg(None)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    # A queue of this process, which need not start another.
    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": results
    results: Any = queue.Queue()
    compat_saves.tell_failed_writes()
    compat_saves.seal_checkpoints(hashed=True, sealed=lambda folder, size: None)
    touches = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal touches
        about = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if about and str(args[0]).startswith(f"{checkpoints}/") and ".rendezvous" not in str(args[0]):
            if touches == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            touches += 1

    sys.addaudithook(count)
    for step in steps:
        folder = checkpoints / f"iter_{step:07d}"
        remove_step(folder)
        folder.mkdir()
        weights = {f"w{n}": ShardedTensor.from_rank_offsets(f"w{n}", torch.full((300,), step + n)) for n in range(4)}
        dist_checkpointing.save(weights, str(folder), TorchDistSaveShardedStrategy(thread_count=2))
        files: Any = checkpointing
        with files.maybe_msc.open(str(checkpoints / TRACKER), "w") as tracker:
            tracker.write(str(step))
    Path(sealed).write_text(str(touches))
    os._exit(0)


def save_and_read_nothing_again(checkpoints: Path, sealed: str) -> None:
    checksum = compat_saves.checksums.checksum

    def checksum_of_no_shard(path: Path, *, hashed: bool = True) -> Any:
        if path.suffix == ".distcp":
            os._exit(3)
        return checksum(path, hashed=hashed)

    compat_saves.checksums.checksum = checksum_of_no_shard
    save(checkpoints, range(1, 2), None, sealed)


def test_what_was_hashed_as_it_was_written_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    assert in_a_process(save_and_read_nothing_again, tmp_path / "whole", str(tmp_path / "sealed")) == 0
    files = read_checksums(tmp_path / "whole" / "iter_0000001")
    assert files is not None and {"__0_0.distcp", "__0_1.distcp", ".metadata"} <= files.keys()


def test_a_save_may_be_killed_at_any_point(tmp_path: Path) -> None:
    sealed = tmp_path / "sealed"
    (tmp_path / "whole").mkdir()
    assert in_a_process(save, tmp_path / "whole", range(1, 2), None, str(sealed)) == 0
    touches = int(sealed.read_text())
    # Folder, two shards, index, format, checksums and tracker, each with its renaming and flushing.
    assert touches > 12
    outcomes = set()
    for kill_at in range(touches):
        checkpoints = tmp_path / f"killed{kill_at}"
        checkpoints.mkdir()
        assert in_a_process(save, checkpoints, range(1, 2), None, str(sealed)) == 0
        assert in_a_process(save, checkpoints, range(2, 3), kill_at, str(sealed)) == -signal.SIGKILL
        newest = find_newest(checkpoints)
        assert newest.step is not None and not newest.lost, kill_at
        assert newest.step.number in (1, 2)
        assert read_checksums(newest.step.folder) is not None, kill_at
        verify_files(newest.step.folder, True)
        outcomes.add(newest.step.number)
        # Whoever saves the step again has it whole.
        assert in_a_process(save, checkpoints, range(2, 3), None, str(sealed)) == 0
        assert find_newest(checkpoints).step == Step(2, checkpoints / "iter_0000002")
        verify_files(checkpoints / "iter_0000002", True)
        assert interrupted_saves(checkpoints) == []
    assert outcomes == {1, 2}


def test_a_killed_save_over_another_of_the_same_step_mixes_nothing(tmp_path: Path) -> None:
    # Somebody went back to step 1; step 2 is written again, in the place of a whole one.
    sealed = tmp_path / "sealed"
    for kill_at in range(0, 12, 2):
        checkpoints = tmp_path / f"killed{kill_at}"
        checkpoints.mkdir()
        assert in_a_process(save, checkpoints, range(1, 3), None, str(sealed)) == 0
        (checkpoints / TRACKER).write_text("")
        assert in_a_process(save, checkpoints, range(2, 3), kill_at, str(sealed)) == -signal.SIGKILL
        newest = find_newest(checkpoints)
        assert newest.step is not None
        verify_files(newest.step.folder, True)


def bucket(folder: Path) -> list[Any]:
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    item = WriteItem(MetadataIndex("w"), WriteItemType.BYTE_IO)
    return [(str(folder / "__0_0.distcp"), "__0_0.distcp", ([(item, io.BytesIO(b"content"))], []))]


@pytest.mark.parametrize("lost", [False, True])
def test_a_worker_started_afresh_brings_checksums_or_the_reason(tmp_path: Path, lost: bool) -> None:
    # As Megatron's persistent worker, which has imported nothing of ours.
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

    spawn = multiprocessing.get_context("spawn")
    folder, manager = tmp_path / "nowhere" if lost else tmp_path, spawn.Manager()
    results = manager.Queue()
    work = functools.partial(compat_saves.write_and_tell, True, [_StorageWriterTransforms()], False)
    process = spawn.Process(target=work, args=(0, bucket(folder), results))
    process.start()
    process.join(600)
    said: Any = results.get()
    manager.shutdown()
    if lost:
        assert isinstance(said, compat_saves.FailedWrite)
        assert "No such file or directory" in str(said)
    else:
        [noted] = [vars(result)["txssm_checksums"] for result in said[0]]
        assert noted[str(tmp_path / "__0_0.distcp")].size == len(b"content")
