"""What is done around Megatron's save_checkpoint: signals wait, recipe and tokenizer are kept, a failure is told."""

import functools
import re
import shutil
import signal
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from megatron_txssm.launch.preflight import saved_step
from megatron_txssm.recipe.recipe import Recipe


def prepare_saves(recipe: Recipe, rank: int) -> None:
    """All of it, for the training loop; before the first save."""
    explain_failed_saves(recipe)
    if rank == 0:
        describe_checkpoints_at_saves(recipe)
    shield_saves_from_sigterm()


def explain_failed_saves(recipe: Recipe) -> None:
    """Let a save fail with one sentence: why, how much room is left, and what the run goes on from."""
    from megatron.training import training
    from torch.distributed.checkpoint import CheckpointException

    from megatron_txssm.checkpoint.load import first_cause
    from megatron_txssm.compat import tell_failed_writes

    tell_failed_writes()
    save = training.save_checkpoint

    @functools.wraps(save)
    def save_or_explain(iteration: int, *args: Any, **kwargs: Any) -> Any:
        try:
            return save(iteration, *args, **kwargs)
        # torch's CheckpointException is no Exception.
        except (Exception, CheckpointException) as error:
            folder = recipe.checkpoint_path
            cause = re.sub(r"RuntimeError: Worker failure: .*?error: ", "", first_cause(error))
            free = shutil.disk_usage(folder).free / 1e9
            before = saved_step(folder)
            goes_on = "begins again" if before is None else f"goes on from step {before}, the newest whole checkpoint"
            raise RuntimeError(
                f"the checkpoint of step {iteration} could not be written to {folder}: {cause} ({free:.3f} GB are left "
                f"there); once that is mended, the same command {goes_on}"
            ) from error

    training.save_checkpoint = save_or_explain


def keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "recipe.yaml.partial"
    partial.write_text(recipe.to_yaml(), encoding="utf-8")
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

    from megatron_txssm.checkpoint.kept_tokenizer import keep_tokenizer

    save, described = training.save_checkpoint, False

    def save_with_description(*args: Any, **kwargs: Any) -> Any:
        nonlocal described
        if not described:
            keep_recipe(recipe, recipe.checkpoint_path)
            keep_tokenizer(recipe, recipe.checkpoint_path)
            described = True
        return save(*args, **kwargs)

    training.save_checkpoint = save_with_description
