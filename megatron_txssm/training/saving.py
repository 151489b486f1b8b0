"""What is done around Megatron's save_checkpoint: signals wait, recipe and tokenizer are kept, a failure is told."""

import contextlib
import errno
import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from megatron_txssm.checkpoint.steps import find_newest, folder_bytes, remove_step, saved_step
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe

# What a rank waits that fails because of another.
ANOTHERS_SECONDS = 2


def prepare_saves(recipe: Recipe, rank: int, say: Callable[[str], None]) -> None:
    """All of it, for the training loop; before the first save. `say` writes a line to the terminal, on rank 0."""
    from megatron_txssm.checkpoint.compat_saves import end_save_helpers_with_rank, seal_checkpoints, tell_failed_writes

    hashed = recipe.checkpoint.verify is not False
    end_save_helpers_with_rank()
    tell_failed_writes(hashed=hashed)
    seal_checkpoints(hashed=hashed, sealed=lambda folder, size: warn_without_room(recipe, size, say))
    explain_failed_saves(recipe)
    begin_saves_in_empty_folders(recipe)
    if rank == 0:
        describe_checkpoints_at_saves(recipe)
    refuse_broken_weights(recipe)
    shield_saves_from_sigterm()
    if recipe.checkpoint.save_interval is not None and rank == 0:
        with contextlib.suppress(UserError):
            newest = find_newest(recipe.checkpoint_path).step
            warn_without_room(recipe, folder_bytes(newest.folder) if newest else 0, say)


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


def begin_saves_in_empty_folders(recipe: Recipe) -> None:
    """Let no save write into what another has left of the same step: their files would mix, and a kill would leave
    a checkpoint that looks whole.
    """
    import torch.distributed as dist
    from megatron.training import checkpointing, training

    save = training.save_checkpoint

    @functools.wraps(save)
    def save_into_empty_folder(iteration: int, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("non_persistent_ckpt"):
            if dist.get_rank() == 0:
                name = checkpointing.get_checkpoint_name(recipe.checkpoint_path, iteration, return_base_dir=True)
                remove_step(Path(name))
            # Nobody writes before.
            dist.barrier()
        return save(iteration, *args, **kwargs)

    training.save_checkpoint = save_into_empty_folder


def refuse_broken_weights(recipe: Recipe) -> None:
    """Let no checkpoint be written from which a run could not go on: it would be the newest.

    Its weights, or what the optimizer keeps, may be NaN or infinite. Or Megatron wants to save because a gradient is:
    whoever resumes from that only computes the same step once more, "to establish a diagnostic", and ends, whatever
    the learning rate.
    """
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
    from megatron.training import training

    from megatron_txssm.training.finite import first_not_finite
    from megatron_txssm.training.not_finite import SAME_AGAIN, explain_not_finite, way_back

    save = training.save_checkpoint

    @functools.wraps(save)
    def save_if_finite(iteration: int, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        asked_for_by_a_gradient = get_rerun_state_machine().state is RerunState.WILL_RERUN_FROM_CHECKPOINT
        broken = "" if asked_for_by_a_gradient else first_not_finite(model, optimizer)
        if not (asked_for_by_a_gradient or broken):
            return save(iteration, model, optimizer, *args, **kwargs)
        # One that is being written, of an earlier step, is sound.
        training.maybe_finalize_async_save(blocking=True)
        if asked_for_by_a_gradient:
            raise FloatingPointError(explain_not_finite(recipe, SAME_AGAIN))
        raise FloatingPointError(
            f"{broken} is NaN or infinite after step {iteration}, which is not saved (metrics.jsonl shows where it "
            f"began). {way_back(recipe)}"
        )

    training.save_checkpoint = save_if_finite


def explain_failed_saves(recipe: Recipe) -> None:
    """Let a save fail with one sentence: why, how much room is left, and what the run goes on from.

    One that is written behind the training (async_save) fails when it is finalized, some steps later.
    """
    from megatron.training import training
    from torch.distributed.checkpoint import CheckpointException

    save, finalize = training.save_checkpoint, training.maybe_finalize_async_save
    begun: list[int] = []

    @functools.wraps(save)
    def save_or_explain(iteration: int, *args: Any, **kwargs: Any) -> Any:
        begun.append(iteration)
        try:
            return save(iteration, *args, **kwargs)
        # torch's CheckpointException is no Exception.
        except (Exception, CheckpointException) as error:
            raise RuntimeError(_failed_save(recipe, iteration, error)) from error

    @functools.wraps(finalize)
    def finalize_or_explain(*args: Any, **kwargs: Any) -> Any:
        try:
            return finalize(*args, **kwargs)
        except (Exception, CheckpointException) as error:
            raise RuntimeError(_failed_save(recipe, begun[-1] if begun else 0, error)) from error

    training.save_checkpoint, training.maybe_finalize_async_save = save_or_explain, finalize_or_explain


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


def shield_saves_from_sigterm() -> None:
    """Let the processes that Megatron starts in order to save live through SIGTERM.

    Slurm sends it to every process of a step. Megatron's handler spares the ranks and their data loaders, but the
    process that collects what was written would die of it, and with it every later save: above all the one that
    SIGTERM asks for. What is started while a signal is blocked has it blocked for life.
    """
    from megatron.training import training

    save = training.save_checkpoint

    def save_with_sigterm_blocked(*args: Any, **kwargs: Any) -> Any:
        # Python's own helper; starting it unblocks SIGTERM.
        resource_tracker.ensure_running()
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return save(*args, **kwargs)
        finally:
            # One that came meanwhile reaches Megatron's handler now.
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    training.save_checkpoint = save_with_sigterm_blocked


def describe_checkpoints_at_saves(recipe: Recipe) -> None:
    """Put recipe and tokenizer beside the checkpoints when one is saved, not before: a run that cannot resume leaves
    theirs as they are.
    """
    from megatron.training import training

    from megatron_txssm.data.tokenizer.kept_tokenizer import keep_tokenizer

    save, described = training.save_checkpoint, False

    def save_with_description(*args: Any, **kwargs: Any) -> Any:
        nonlocal described
        if not described:
            keep_recipe(recipe, recipe.checkpoint_path)
            keep_tokenizer(recipe, recipe.checkpoint_path)
            described = True
        return save(*args, **kwargs)

    training.save_checkpoint = save_with_description
