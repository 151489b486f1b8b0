"""What is done around Megatron's save_checkpoint: signals wait, recipe and tokenizer are kept, a failure is told."""

import functools
import shutil
import signal
import time
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from megatron_txssm.launch.preflight import saved_step
from megatron_txssm.recipe.recipe import Recipe

# What a rank waits that fails because of another.
ANOTHERS_SECONDS = 2
# Megatron's exit codes where a gradient is not finite, once more or when computed again.
NOT_FINITE = (16, 17)


def prepare_saves(recipe: Recipe, rank: int) -> None:
    """All of it, for the training loop; before the first save."""
    from megatron_txssm.compat import end_save_helpers_with_rank

    end_save_helpers_with_rank()
    explain_failed_saves(recipe)
    if rank == 0:
        describe_checkpoints_at_saves(recipe)
    refuse_broken_weights(recipe)
    shield_saves_from_sigterm()


def explain_not_finite(recipe: Recipe) -> str:
    """What to say where Megatron stops for a gradient that is not finite."""
    from megatron_txssm.compat import get_args

    step, before = get_args().curr_iteration + 1, saved_step(recipe.checkpoint_path)
    sound = (
        "there is no checkpoint" if before is None else f"the newest checkpoint, of step {before}, has finite weights"
    )
    return (
        f"the loss or a gradient of step {step} is NaN or infinite; {sound}. What may help: a lower "
        "optimizer.learning_rate with megatron.override_opt_param_scheduler=true, from there or from an older step "
        f"(its number in {recipe.checkpoint_path}/latest_checkpointed_iteration.txt)"
    )


def refuse_broken_weights(recipe: Recipe) -> None:
    """Let no checkpoint be written from which a run could not go on: it would be the newest.

    Its weights may be NaN or infinite. Or Megatron wants to save because a gradient is: whoever resumes from that only
    computes the same step once more, "to establish a diagnostic", and ends, whatever the learning rate.
    """
    import torch
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
    from megatron.training import training

    save = training.save_checkpoint

    @functools.wraps(save)
    def save_if_finite(iteration: int, model: Any, *args: Any, **kwargs: Any) -> Any:
        if get_rerun_state_machine().state is RerunState.WILL_RERUN_FROM_CHECKPOINT:
            raise FloatingPointError(explain_not_finite(recipe))
        broken = torch.zeros(1, dtype=torch.int, device=torch.cuda.current_device())
        for parameter in (parameter.detach() for chunk in model for parameter in chunk.parameters()):
            broken |= ~parameter.isfinite().all()
        torch.distributed.all_reduce(broken, op=torch.distributed.ReduceOp.MAX)
        if broken:
            before = saved_step(recipe.checkpoint_path)
            sound = "none before it is saved" if before is None else f"the newest checkpoint is that of step {before}"
            raise FloatingPointError(
                f"weights are NaN or infinite after step {iteration}, which is not saved; {sound}. metrics.jsonl shows "
                "where it began; lower optimizer.learning_rate"
            )
        return save(iteration, model, *args, **kwargs)

    training.save_checkpoint = save_if_finite


def explain_failed_saves(recipe: Recipe) -> None:
    """Let a save fail with one sentence: why, how much room is left, and what the run goes on from."""
    from megatron.training import training
    from torch.distributed.checkpoint import CheckpointException

    from megatron_txssm.checkpoint.load import first_cause
    from megatron_txssm.compat import failed_writes, tell_failed_writes

    tell_failed_writes()
    save = training.save_checkpoint

    @functools.wraps(save)
    def save_or_explain(iteration: int, *args: Any, **kwargs: Any) -> Any:
        try:
            return save(iteration, *args, **kwargs)
        # torch's CheckpointException is no Exception.
        except (Exception, CheckpointException) as error:
            folder = recipe.checkpoint_path
            if not (failed_writes or isinstance(error, OSError)):
                # Another rank has the reason, and is to be the first to say so.
                time.sleep(ANOTHERS_SECONDS)
            cause = failed_writes[0] if failed_writes else first_cause(error)
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
