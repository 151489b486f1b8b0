"""What is done around Megatron's save_checkpoint: signals wait, recipe and tokenizer are kept, a failure is told."""

import contextlib
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from megatron_txssm.checkpoint.steps import find_newest, folder_bytes, remove_step, saved_step
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.hooks import Call, Listener, listen

# What a rank waits that fails because of another.
ANOTHERS_SECONDS = 2


def prepare_saves(recipe: Recipe, rank: int, say: Callable[[str], None]) -> None:
    """All of it, for the training loop; before the first save. `say` writes a line to the terminal, on rank 0."""
    from megatron_txssm.checkpoint.compat_saves import end_save_helpers_with_rank, seal_checkpoints, tell_failed_writes

    hashed = recipe.checkpoint.verify is not False
    end_save_helpers_with_rank()
    tell_failed_writes(hashed=hashed)
    seal_checkpoints(hashed=hashed, sealed=lambda folder, size: warn_without_room(recipe, size, say))
    listen(GuardedSaves(recipe, rank))
    if recipe.checkpoint.save_interval is not None and rank == 0:
        with contextlib.suppress(UserError):
            newest = find_newest(recipe.checkpoint_path).step
            warn_without_room(recipe, folder_bytes(newest.folder) if newest else 0, say)


@dataclass
class GuardedSaves(Listener):
    """Every save of the training loop: sound or refused, whole or explained, and with its recipe beside it."""

    recipe: Recipe
    rank: int
    # Recipe and tokenizer lie beside the checkpoints.
    described: bool = field(default=False, init=False, compare=False)
    # The step of the save that was begun last.
    begun: int = field(default=0, init=False, compare=False)

    def around_save(self, call: Call, proceed: Callable[[], Any]) -> Any:
        from torch.distributed.checkpoint import CheckpointException

        with sigterm_blocked():
            refuse_broken_weights(self.recipe, call)
            if self.rank == 0 and not self.described:
                describe_checkpoints(self.recipe)
                self.described = True
            if not call.non_persistent_ckpt:
                empty_folder(self.recipe, call.iteration)
            self.begun = call.iteration
            try:
                return proceed()
            # torch's CheckpointException is no Exception.
            except (Exception, CheckpointException) as error:
                raise RuntimeError(_failed_save(self.recipe, self.begun, error)) from error

    def around_finalize(self, call: Call, proceed: Callable[[], Any]) -> Any:
        """A save that is written behind the training (async_save) fails here, some steps later."""
        from torch.distributed.checkpoint import CheckpointException

        try:
            return proceed()
        except (Exception, CheckpointException) as error:
            raise RuntimeError(_failed_save(self.recipe, self.begun, error)) from error


@contextlib.contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Let the processes that Megatron starts in order to save live through SIGTERM.

    Slurm sends it to every process of a step. Megatron's handler spares the ranks and their data loaders, but the
    process that collects what was written would die of it, and with it every later save: above all the one that
    SIGTERM asks for. What is started while a signal is blocked has it blocked for life.
    """
    # Python's own helper; starting it unblocks SIGTERM.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        # One that came meanwhile reaches Megatron's handler now.
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def refuse_broken_weights(recipe: Recipe, save: Call) -> None:
    """Let no checkpoint be written from which a run could not go on: it would be the newest.

    Its weights, or what the optimizer keeps, may be NaN or infinite. Or Megatron wants to save because a gradient is:
    whoever resumes from that only computes the same step once more, "to establish a diagnostic", and ends, whatever
    the learning rate.
    """
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
    from megatron.training import training

    from megatron_txssm.training.finite import first_not_finite
    from megatron_txssm.training.not_finite import SAME_AGAIN, explain_not_finite, way_back

    asked_for_by_a_gradient = get_rerun_state_machine().state is RerunState.WILL_RERUN_FROM_CHECKPOINT
    broken = "" if asked_for_by_a_gradient else first_not_finite(save.model, save.optimizer)
    if not (asked_for_by_a_gradient or broken):
        return
    # One that is being written, of an earlier step, is sound.
    training.maybe_finalize_async_save(blocking=True)
    if asked_for_by_a_gradient:
        raise FloatingPointError(explain_not_finite(recipe, SAME_AGAIN))
    raise FloatingPointError(
        f"{broken} is NaN or infinite after step {save.iteration}, which is not saved (metrics.jsonl shows where it "
        f"began). {way_back(recipe)}"
    )


def describe_checkpoints(recipe: Recipe) -> None:
    """Put recipe and tokenizer beside the checkpoints when one is saved, not before: a run that cannot resume leaves
    theirs as they are.
    """
    from megatron_txssm.data.tokenizer.kept_tokenizer import keep_tokenizer

    keep_recipe(recipe, recipe.checkpoint_path)
    keep_tokenizer(recipe, recipe.checkpoint_path)


def empty_folder(recipe: Recipe, iteration: int) -> None:
    """Let no save write into what another has left of the same step: their files would mix, and a kill would leave
    a checkpoint that looks whole. Every rank calls it, and nobody writes before.
    """
    import torch.distributed as dist
    from megatron.training import checkpointing

    if dist.get_rank() == 0:
        remove_step(Path(checkpointing.get_checkpoint_name(recipe.checkpoint_path, iteration, return_base_dir=True)))
    dist.barrier()


def warn_without_room(recipe: Recipe, needed: int, say: Callable[[str], None]) -> None:
    """Say so where the next checkpoint will not fit, of as many bytes as the last. A quota is not seen."""
    disk = shutil.disk_usage(recipe.checkpoint_path)
    if disk.total and disk.free < needed:
        say(
            f"warning: {recipe.checkpoint_path} has {_size(disk.free)} left, and the next checkpoint takes "
            f"{_size(needed)}: make room, or the run ends with the next save"
        )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def explain_full_disk(recipe: Recipe, error: BaseException) -> BaseException:
    """The error itself, or where a full disk or a quota is behind it (metrics, logs, TensorBoard): what that means."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    before = saved_step(recipe.checkpoint_path) if recipe.checkpoint.save_interval is not None else None
    goes_on = "begins again" if before is None else f"goes on from step {before}"
    return RuntimeError(
        f"the run could not write its metrics, logs or events to {recipe.run_path}: {error}; once there is room, the "
        f"same command {goes_on}"
    )


def _failed_save(recipe: Recipe, iteration: int, error: BaseException) -> str:
    """What is said of it; what is left of it is removed, as it holds the room of the next."""
    from megatron_txssm.checkpoint.compat_saves import failed_writes
    from megatron_txssm.checkpoint.load import first_cause

    if not (failed_writes or isinstance(error, OSError)):
        # Another rank has the reason, and is to be the first to say so.
        time.sleep(ANOTHERS_SECONDS)
    folder = recipe.checkpoint_path
    cause = failed_writes[0] if failed_writes else error
    before, partial = saved_step(folder), folder / f"iter_{iteration:07d}"
    room = f"{_size(shutil.disk_usage(folder).free)} are left there"
    if isinstance(cause, OSError) and cause.errno == errno.EDQUOT:
        room = "how much of the quota is left, `quota` or `lfs quota` says"
    left = ""
    if partial.is_dir() and before != iteration and os.environ.get("RANK", "0") == "0":
        size = folder_bytes(partial)
        remove_step(partial)
        left = f"; what it had written ({_size(size)}) is removed"
    goes_on = "begins again" if before is None else f"goes on from step {before}, the newest whole checkpoint"
    said = cause if isinstance(cause, OSError) else first_cause(cause)
    return (
        f"the checkpoint of step {iteration} could not be written to {folder}: {said} ({room}{left}); once that is "
        f"mended, the same command {goes_on}"
    )


def keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "recipe.yaml.partial"
    partial.write_text(recipe.frozen(folder), encoding="utf-8")
    partial.replace(folder / "recipe.yaml")
