"""Fixes for Megatron's writing of checkpoints; besides compat.py, the only file that imports its private names.

A rank's part of a save may run in the rank, in a process forked from it (async_save) or in a freshly started one
(use_persistent_ckpt_worker), which does not have this process's patches; so the function sent there is ours.
"""

import functools
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, TextIO

from megatron_txssm.checkpoint import checksums, steps
from megatron_txssm.checkpoint.checksums import Checksum, HashingFile
from megatron_txssm.slurm.environment import end_with_parent

# This process's failed writes to checkpoints.
failed_writes: list[Exception] = []
# Path of a file written by this process -> its checksum, until the save ends.
_written: dict[str, Checksum] = {}


class FailedWrite(OSError):
    """Writing a checkpoint file failed; the text is the file system's message."""


def tell_failed_writes(*, hashed: bool = True) -> None:
    """Keep the errors of a save in `failed_writes`: Megatron only passes on the exception's type (idempotent).

    `hashed`: hash data as it is written, for `seal_checkpoints`.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    writer: Any = FileSystemWriterAsync
    if hasattr(writer.get_save_function_and_args, "__txssm__"):
        return
    get_function, retrieve = writer.get_save_function_and_args, writer.retrieve_write_results

    @functools.wraps(get_function)
    def get_our_function(self: Any) -> Any:
        function, preload, args = get_function(self)
        return function and functools.partial(write_and_tell, hashed, *function.args), preload, args

    @functools.wraps(retrieve)
    def retrieve_and_note(self: Any) -> Any:
        results = retrieve(self)
        if isinstance(results, list):
            for result in results:
                _written.update(vars(result).pop(_NOTED, {}))
        else:
            failed_writes.extend(error for error in _causes(results[0]) if isinstance(error, FailedWrite))
        return results

    setattr(get_our_function, "__txssm__", True)
    writer.get_save_function_and_args, writer.retrieve_write_results = get_our_function, retrieve_and_note


# The attribute of a file's first result that carries checksums from the process that wrote the file.
_NOTED = "txssm_checksums"


def write_and_tell(
    hashed: bool, transforms: Sequence[Any], use_msc: bool, rank: int, write_buckets: list[Any], results: Any
) -> None:
    """Replaces Megatron's write_preloaded_data_multithread; adds checksums and the original error."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    module: Any = filesystem_async
    write = module.FileSystemWriterAsync.write_preloaded_data
    noted: dict[str, Checksum] = {}
    errors: list[BaseException] = []
    # Threads write concurrently.
    files = threading.local()

    def open_hashing(path: str, mode: str) -> HashingFile:
        stream: Any = open(path, mode)  # noqa: SIM115
        files.last = HashingFile(stream, hashed=hashed)
        return files.last

    @functools.wraps(write)
    def write_and_note(*args: Any, **kwargs: Any) -> Any:
        files.last = None
        written = write(*args, **kwargs)
        if isinstance(written[1], Exception):
            errors.append(written[1])
        elif files.last is not None:
            noted[str(kwargs["write_bucket"][0])] = files.last.checksum()
        return written

    module.FileSystemWriterAsync.write_preloaded_data = staticmethod(write_and_note)
    # Shadows the built-in in this module.
    module.open = open_hashing
    try:
        relay = _Relay()
        try:
            module.FileSystemWriterAsync.write_preloaded_data_multithread(
                transforms, use_msc, rank, write_buckets, relay
            )
        except Exception as error:
            relay.put(error)
            errors.append(error)
    finally:
        module.FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
        del module.open
    said = relay.said
    if errors:
        said = what_the_file_system_said(errors[0])
    elif isinstance(said, dict):
        first = next((result for of_file in said.values() for result in of_file), None)
        if first is not None:
            # A frozen dataclass, whose attributes are pickled with it.
            object.__setattr__(first, _NOTED, noted)
    results.put(said)


class _Relay:
    """A queue of one item, in this process."""

    said: Any = None

    def put(self, said: Any) -> None:
        self.said = said


def what_the_file_system_said(error: BaseException) -> Exception:
    """The original error: torch's archive writer raises another one on closing, which hides it."""
    for cause in _causes(error):
        if isinstance(cause, OSError):
            return FailedWrite(cause.errno, cause.strerror, cause.filename)
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def seal_checkpoints(*, hashed: bool, sealed: Callable[[Path, int], None]) -> None:
    """Make every save write checksums.json before the tracker names it, and make the tracker atomic.

    `sealed` is called on rank 0 with the step's folder and the size of its files in bytes. Every rank hashes the files
    that it wrote without hashing, which are only those of nvidia-resiliency-ext's writer.
    """
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    module: Any = dist_checkpointing
    save = module.save
    if hasattr(save, "__txssm__"):
        return

    @functools.wraps(save)
    def save_and_seal(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        request = save(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        seal = functools.partial(_seal, Path(checkpoint_dir), hashed=hashed, sealed=sealed)
        if request is None:
            seal()
        else:
            # After Megatron's own functions, before the one that writes the tracker.
            request.finalize_fns.append(seal)
        return request

    setattr(save_and_seal, "__txssm__", True)
    module.save = save_and_seal
    files: Any = checkpointing
    files.maybe_msc = _AtomicTracker(files.maybe_msc)


def _seal(folder: Path, *, hashed: bool, sealed: Callable[[Path, int], None]) -> None:
    import torch.distributed as dist

    rank = dist.get_rank()
    ours = {Path(path).name: _written.pop(path) for path in list(_written) if Path(path).parent == folder}
    if not ours:
        # nvidia-resiliency-ext's writer. (Otherwise avoided: every rank would list a folder of all ranks' files.)
        ours = {path.name: checksums.checksum(path, hashed=hashed) for path in folder.glob(f"*__{rank}_*.distcp")}
    of_ranks: list[dict[str, Checksum]] | None = [{}] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(ours, of_ranks)
    if of_ranks is None:
        return
    files = {name: entry for of_rank in of_ranks for name, entry in of_rank.items()}
    others = [path for path in folder.iterdir() if path.suffix not in (".distcp", ".tmp") and path.is_file()]
    known = (path for path in others if path.name != checksums.CHECKSUMS)
    files |= {path.name: checksums.checksum(path, hashed=hashed) for path in known}
    for path in others:
        steps.flush_to_disk(path)
    with steps.whole_or_not_at_all(folder / checksums.CHECKSUMS) as partial:
        partial.write_text(checksums.to_text(files))
    steps.flush_to_disk(folder.parent)
    sealed(folder, sum(entry.size for entry in files.values()))


class _AtomicTracker:
    """Megatron's file functions, except for the tracker, which Megatron would truncate before writing."""

    def __init__(self, functions: Any):
        self.functions = functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.functions, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "w" or Path(path).name != steps.TRACKER or "://" in str(path):
            return self.functions.open(path, mode, *args, **kwargs)
        return _open_whole(Path(path))


class _open_whole:
    def __init__(self, path: Path):
        self._whole = steps.whole_or_not_at_all(path)

    def __enter__(self) -> TextIO:
        self._stream = open(self._whole.__enter__(), "w", encoding="utf-8")
        return self._stream

    def __exit__(self, *error: Any) -> bool | None:
        self._stream.close()
        return self._whole.__exit__(*error)


def end_save_helpers_with_rank() -> None:
    """Make the process that collects an asynchronous save's results end with its rank, even if the rank is killed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import _disable_gc

    writer: Any = filesystem_async

    @_disable_gc()
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if writer._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(end_with_parent)
            writer._results_queue = manager.Queue()
        return writer._results_queue

    writer.get_write_results_queue = get_write_results_queue
