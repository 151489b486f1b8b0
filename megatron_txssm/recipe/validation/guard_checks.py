"""Checks of the steps to skip and of the spike guard."""

import math

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.settings.setting import step_numbers


def check_skip_steps(recipe: Recipe) -> None:
    """UserError if a step is not one of the training, or is its first."""
    for entry in recipe.data.skip_steps or ():
        # Before `recipe.skip_steps` writes out a range.
        if step_numbers(entry)[-1] > recipe.train_iters:
            raise UserError(
                f"data.skip_steps: {entry} is beyond the last step, {recipe.train_iters}; use 1 to {recipe.train_iters}"
            )
    if 1 in recipe.skip_steps:
        raise UserError(
            "data.skip_steps has step 1, but a run cannot resume from a checkpoint from before the optimizer's first "
            "update; leave it out, or set another training.seed"
        )


def check_guard(recipe: Recipe) -> None:
    """UserError if the spike guard would have nothing to go back to."""
    guard, checkpoint = recipe.guard, recipe.checkpoint
    if guard.spike_action != "rewind":
        return
    if checkpoint.save_interval is None:
        raise UserError(
            "guard.spike_action=rewind goes back to a checkpoint, and checkpoint.save_interval=null saves none; set "
            "save_interval, or guard.spike_action=skip"
        )
    # One may have been saved in the step before the spike.
    needed = 1 + math.ceil(guard.rewind_steps / checkpoint.save_interval)
    if checkpoint.keep_last is not None and checkpoint.keep_last < needed:
        raise UserError(
            f"checkpoint.keep_last={checkpoint.keep_last} may leave no checkpoint from before the last "
            f"{guard.rewind_steps} steps (guard.rewind_steps), which guard.spike_action=rewind needs; set "
            f"checkpoint.keep_last={needed}"
        )
