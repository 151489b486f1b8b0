"""The schedule of a resumed run: whether it may differ from the checkpoint's, and how it does. Without torch."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_txssm.checkpoint.steps import TRACKER, Step, whole_steps
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe

# Includes the optimizer's settings: Megatron would silently use the checkpoint's.
_OF_OPTIMIZER = (
    *("learning_rate", "min_learning_rate_ratio", "weight_decay", "warmup_fraction", "decay_style"),
    *("wsd_decay_fraction", "wsd_decay_shape", "adam_beta1", "adam_beta2", "adam_eps", "muon_momentum"),
)
_OF_MEGATRON = (
    *("lr_decay_iters", "lr_warmup_init"),
    *("start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)


def check_schedule(recipe: Recipe, saved: Recipe, step: Step) -> None:
    """UserError if the run would continue `step` beyond its own end, or unasked under another schedule.

    saved: the checkpoint's recipe.
    """
    folder = step.folder.parent
    own, changes = folder == recipe.checkpoint_path, changed_schedule(saved, recipe)
    if (own and not changes) or recipe.megatron.get("skip_train"):
        return
    # At its own last step, a run is finished.
    if step.number >= recipe.train_iters + own:
        raise UserError(
            f"{_stated_length(recipe)} ends before step {step.number + 1}, the first after the checkpoint "
            f"{step.folder}; train longer{_or_go_back(recipe, folder)}"
        )
    if changes and recipe.optimizer.schedule_at_resume == "unchanged":
        raise UserError(
            f"{folder} was trained under another schedule ({changes}); set optimizer.schedule_at_resume=recipe to "
            f"continue from step {step.number} under this one, or state the old one ({folder / 'recipe.yaml'})"
        )


def _or_go_back(recipe: Recipe, folder: Path) -> str:
    earlier = [step for step in reversed(whole_steps(folder)) if step.number < recipe.train_iters]
    if not earlier:
        return ""
    if folder != recipe.checkpoint_path:
        return f", or set checkpoint.branch_from to {' or '.join(step.folder.name for step in earlier)}"
    return (
        f", or go back to {' or '.join(str(step.number) for step in earlier)}: "
        f"echo STEP > {shlex.quote(str(folder / TRACKER))}"
    )


def schedule_warnings(recipe: Recipe, saved: Recipe, step: Step) -> Iterator[str]:
    """What changes at the resume of `step`."""
    if not (changes := changed_schedule(saved, recipe)):
        return
    yield f"from step {step.number + 1} on, this run has another schedule than before ({changes})"
    warm_up = recipe.optimizer.warmup_fraction * (recipe.megatron.get("lr_decay_iters") or recipe.train_iters)
    if step.number < warm_up:
        yield (
            f"step {step.number + 1} is within the warm-up of the new schedule, which takes {warm_up:.0f} steps "
            f"(optimizer.warmup_fraction={recipe.optimizer.warmup_fraction:g}): the learning rate starts low again"
        )


def changed_schedule(saved: Recipe, recipe: Recipe) -> str:
    """The fields of the schedule that differ, each with both values; empty if none does."""
    return differences(_schedule(saved), _schedule(recipe))


def differences(theirs: Mapping[str, object], ours: Mapping[str, object]) -> str:
    """The entries that differ, each with both values; empty if none does."""
    return "; ".join(f"{name}: {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name])


def _schedule(recipe: Recipe) -> Mapping[str, object]:
    """The values saved by Megatron's OptimizerParamScheduler and its optimizers, and those that it should save."""
    return {
        "training.train_iters": recipe.train_iters,
        "training.global_batch_tokens": recipe.training.global_batch_tokens,
        # The schedule counts samples.
        "samples a step (global_batch_tokens / training.seq_length)": recipe.global_batch_size,
        **{f"optimizer.{name}": getattr(recipe.optimizer, name) for name in _OF_OPTIMIZER},
        **{f"megatron.{name}": recipe.megatron.get(name) for name in _OF_MEGATRON},
    }


def _stated_length(recipe: Recipe) -> str:
    if recipe.training.train_iters is not None:
        return f"training.train_iters={recipe.train_iters}"
    return f"training.train_tokens={recipe.training.train_tokens} ({recipe.train_iters} steps)"
