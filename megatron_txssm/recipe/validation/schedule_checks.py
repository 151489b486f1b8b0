"""Checks of learning rate and weight decay over the steps. Each error gives name, value and remedy."""

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe


def check_schedule(recipe: Recipe) -> None:
    """UserError if the schedule contradicts itself, or Megatron's would end with an assertion."""
    _check_wsd(recipe)
    end, start = recipe.megatron.get("lr_decay_iters"), recipe.megatron.get("lr_warmup_init")
    if end is not None and end < 1:
        raise UserError(f"megatron.lr_decay_iters={end} must be at least 1; leave it out to decay until the last step")
    if start is not None and not 0 <= start <= recipe.optimizer.learning_rate:
        raise UserError(
            f"megatron.lr_warmup_init={start:g} must be from 0 to optimizer.learning_rate="
            f"{recipe.optimizer.learning_rate:g}, to which the warm-up leads"
        )
    _check_weight_decay(recipe)


def _check_wsd(recipe: Recipe) -> None:
    optimizer, share = recipe.optimizer, recipe.optimizer.wsd_decay_fraction
    if optimizer.decay_style == "WSD" and share is None:
        raise UserError(
            "optimizer.decay_style=WSD needs optimizer.wsd_decay_fraction, the final fraction of the steps, such as "
            "0.1, in which the learning rate falls"
        )
    if share is None:
        return
    if optimizer.decay_style != "WSD":
        raise UserError(
            f"optimizer.wsd_decay_fraction={share:g} has no effect with decay_style={optimizer.decay_style}; "
            "set optimizer.decay_style=WSD, or leave it out"
        )
    if (end := recipe.megatron.get("lr_decay_iters")) is not None:
        raise UserError(
            f"megatron.lr_decay_iters={end} contradicts decay_style=WSD, which decays until the last step; leave it out"
        )
    if share + optimizer.warmup_fraction > 1:
        raise UserError(
            f"optimizer.warmup_fraction={optimizer.warmup_fraction:g} and wsd_decay_fraction={share:g} add up to more "
            "than all steps; make one smaller"
        )


def _check_weight_decay(recipe: Recipe) -> None:
    style = recipe.megatron.get("weight_decay_incr_style") or "constant"
    start, end = (recipe.megatron.get(f"{which}_weight_decay") for which in ("start", "end"))
    if style == "constant" and not (start is None and end is None):
        raise UserError(
            "megatron.start_weight_decay and end_weight_decay have no effect with weight_decay_incr_style=constant; "
            "set that to linear or cosine, or state optimizer.weight_decay"
        )
    if style != "constant" and (start is None or end is None or not 0 <= start <= end):
        raise UserError(
            f"megatron.weight_decay_incr_style={style} needs start_weight_decay (now {start}), at least 0, and "
            f"end_weight_decay (now {end}), at least as high"
        )
