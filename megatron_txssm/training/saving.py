"""Wraps Megatron's save_checkpoint: blocks signals, keeps recipe and tokenizer, explains failures."""

import contextlib
import errno
import functools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path

from megatron_txssm.checkpoint.steps import find_newest, folder_bytes, remove_step, saved_step
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.hooks import Call, Listener, listen

# Seconds that a rank waits before reporting a failure that another rank caused.
ANOTHERS_SECONDS = 2


def prepare_saves(recipe: Recipe, rank: int, say: Callable[[str], None]) -> None:
    """Prepare the training loop's saves; call it before the first. `say` writes a line to the terminal, on rank 0."""
    from megatron_txssm.checkpoint.compat_saves import end_save_helpers_with_rank, seal_checkpoints, tell_failed_writes

    hashed = recipe.checkpoint.verify is not False
    end_save_helpers_with_rank()
    tell_failed_writes(hashed=hashed)
    seal_checkpoints(hashed=hashed, sealed=functools.partial(_sealed, recipe, say))
    listen(GuardedSaves(recipe, rank))
    if recipe.checkpoint.save_interval is not None and rank == 0:
        with contextlib.suppress(UserError):
            newest = find_newest(recipe.checkpoint_path).step
            warn_without_room(recipe, folder_bytes(newest.folder) if newest else 0, say)


def _sealed(recipe: Recipe, say: Callable[[str], None], folder: Path, size: int) -> None:
    # Otherwise room is made first (old_checkpoints.py).
    if recipe.checkpoint.keep_last is None:
        warn_without_room(recipe, size, say)


@dataclass
class GuardedSaves(Listener):
    """Every save of the training loop: refuses non-finite weights, explains failures, writes the recipe beside it."""

    recipe: Recipe
    rank: int
    # Whether recipe and tokenizer are beside the checkpoints.
    described: bool = field(default=False, init=False, compare=False)
    # The step of the last save that was begun.
    begun: int = field(default=0, init=False, compare=False)

    def around_save(self, call: Call, proceed: Callable[[], object]) -> object:
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
            # torch's CheckpointException is not an Exception.
            except (Exception, CheckpointException) as error:
                raise RuntimeError(_failed_save(self.recipe, self.begun, error)) from error

    def around_finalize(self, call: Call, proceed: Callable[[], object]) -> object:
        """An asynchronous save (async_save) fails here, some steps later."""
        from torch.distributed.checkpoint import CheckpointException

        try:
            return proceed()
        except (Exception, CheckpointException) as error:
            raise RuntimeError(_failed_save(self.recipe, self.begun, error)) from error


@contextlib.contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Let the helper processes of Megatron's saves survive SIGTERM.

    Slurm sends it to every process of a step. Megatron's handler protects the ranks and their data loaders, but the
    process that collects write results would die, and every later save with it, including the one that SIGTERM
    requests. Processes started while a signal is blocked inherit the mask.
    """
    # Starting Python's resource tracker unblocks SIGTERM, so start it first.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        # A signal that arrived meanwhile now reaches Megatron's handler.
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def refuse_broken_weights(recipe: Recipe, save: Call) -> None:
    """Prevent a save from which the run could not continue: it would be the newest checkpoint.

    Weights or optimizer state may be NaN or infinite. Or Megatron saves because a gradient is: a run that resumes from
    such a checkpoint only recomputes that step, "to establish a diagnostic", and exits, at any learning rate.
    """
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
    from megatron.training import training

    from megatron_txssm.training.finite import first_not_finite
    from megatron_txssm.training.not_finite import SAME_AGAIN, explain_not_finite, way_back

    asked_for_by_a_gradient = get_rerun_state_machine().state is RerunState.WILL_RERUN_FROM_CHECKPOINT
    broken = "" if asked_for_by_a_gradient else first_not_finite(save.model, save.optimizer)
    if not (asked_for_by_a_gradient or broken):
        return
    # An earlier step's checkpoint that is still being written is sound.
    training.maybe_finalize_async_save(blocking=True)
    if asked_for_by_a_gradient:
        raise FloatingPointError(explain_not_finite(recipe, SAME_AGAIN))
    raise FloatingPointError(
        f"{broken} is NaN or infinite after step {save.iteration}, which is not saved (metrics.jsonl shows where it "
        f"began). {way_back(recipe)}"
    )


def describe_checkpoints(recipe: Recipe) -> None:
    """Write recipe and tokenizer beside the checkpoints.

    Only when a checkpoint is saved: a run that cannot resume must not replace existing ones.
    """
    from megatron_txssm.data.tokenizer.kept_tokenizer import keep_tokenizer

    keep_recipe(recipe, recipe.checkpoint_path)
    keep_tokenizer(recipe, recipe.checkpoint_path)


def empty_folder(recipe: Recipe, iteration: int) -> None:
    """Remove the remains of an earlier save of the same step.

    Otherwise the files would mix, and after a kill the checkpoint would look whole. Every rank calls it; the barrier
    keeps all from writing before.
    """
    import torch.distributed as dist
    from megatron.training import checkpointing

    if dist.get_rank() == 0:
        remove_step(Path(checkpointing.get_checkpoint_name(recipe.checkpoint_path, iteration, return_base_dir=True)))
    dist.barrier()


def warn_without_room(recipe: Recipe, needed: int, say: Callable[[str], None]) -> None:
    """Warn if the next checkpoint, of the last one's size, does not fit. Quotas are not checked."""
    disk = shutil.disk_usage(recipe.checkpoint_path)
    if disk.total and disk.free < needed:
        say(
            f"warning: {recipe.checkpoint_path} has {_size(disk.free)} left, and the next checkpoint takes "
            f"{_size(needed)}: make room, or the next save will end the run"
        )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def explain_full_disk(recipe: Recipe, error: BaseException) -> BaseException:
    """The error; or if a full disk or a quota caused it (metrics, logs, TensorBoard), its explanation."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    before = saved_step(recipe.checkpoint_path) if recipe.checkpoint.save_interval is not None else None
    continues = "starts from the beginning" if before is None else f"continues from step {before}"
    return RuntimeError(
        f"the run could not write its metrics, logs or events to {recipe.run_path}: {error}; once there is room, the "
        f"same command {continues}"
    )


def _failed_save(recipe: Recipe, iteration: int, error: BaseException) -> str:
    """The error message of a failed save; removes what it wrote, which takes the space of the next."""
    from megatron_txssm.checkpoint.compat_saves import failed_writes
    from megatron_txssm.checkpoint.load import first_cause

    if not (failed_writes or isinstance(error, OSError)):
        # Another rank knows the cause; let it report first.
        time.sleep(ANOTHERS_SECONDS)
    folder = recipe.checkpoint_path
    cause = failed_writes[0] if failed_writes else error
    before, partial = saved_step(folder), folder / f"iter_{iteration:07d}"
    room = f"{_size(shutil.disk_usage(folder).free)} are free there"
    if isinstance(cause, OSError) and cause.errno == errno.EDQUOT:
        room = "`quota` or `lfs quota` shows how much of the quota is left"
    left = ""
    if partial.is_dir() and before != iteration and os.environ.get("RANK", "0") == "0":
        size = folder_bytes(partial)
        remove_step(partial)
        left = f"; what it had written ({_size(size)}) was removed"
    continues = "starts from the beginning"
    if before is not None:
        continues = f"continues from step {before}, the newest complete checkpoint"
    said = cause if isinstance(cause, OSError) else first_cause(cause)
    return (
        f"the checkpoint of step {iteration} could not be written to {folder}: {said} ({room}{left}); once that is "
        f"fixed, the same command {continues}"
    )


def keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "recipe.yaml.partial"
    partial.write_text(recipe.frozen(folder), encoding="utf-8")
    partial.replace(folder / "recipe.yaml")
