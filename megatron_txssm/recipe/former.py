"""Recipes of earlier versions.

Their layers were a mixer and its FFN: S or A, repeated over `model.num_layers`. Megatron's switches said which schedule
holds at a resume.
"""

from collections.abc import Sequence
from typing import Any

from megatron_txssm.architecture.layer_pattern import (
    ATTENTION,
    MODULE,
    STATE_SPACE,
    blocks,
    from_letters,
    layers,
    repeated_part,
)
from megatron_txssm.errors import UserError

# Of a complete recipe.
_SECTIONS = {"model", "parallel", "training", "optimizer", "data", "checkpoint", "logging"}
# Of recipes that did not state it.
_DEFAULT = "SSSSSSSA"
_NUM_LAYERS = "model.num_layers"
_SWITCHES = {"override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"}
# Beyond it, a number of layers is a mistake.
_MOST = 1000


def translated(data: dict[str, Any]) -> dict[str, Any]:
    """A file's content; if it is a complete recipe as earlier runs kept it with their checkpoints, in today's terms."""
    if not set(data) >= _SECTIONS:
        return data
    return _with_present_layers(_with_schedule_at_resume(data))


def _with_schedule_at_resume(data: dict[str, Any]) -> dict[str, Any]:
    megatron, optimizer = data.get("megatron"), data["optimizer"]
    if not isinstance(megatron, dict) or not isinstance(optimizer, dict) or not _SWITCHES & set(megatron):
        return data
    # The other switch has no successor: it kept the checkpoint's schedule, whatever the recipe stated.
    holds = {"schedule_at_resume": "recipe"} if megatron.get("override_opt_param_scheduler") else {}
    rest = {name: value for name, value in megatron.items() if name not in _SWITCHES}
    return data | {"optimizer": optimizer | holds, "megatron": rest}


def _with_present_layers(data: dict[str, Any]) -> dict[str, Any]:
    model, training = data["model"], data["training"]
    if not isinstance(model, dict) or not isinstance(training, dict):
        return data
    pattern = _written_out(model.get("layer_pattern", _DEFAULT), model.get("num_layers"))
    if pattern is None:
        return data
    model = {name: value for name, value in model.items() if name != "num_layers"} | {"layer_pattern": pattern}
    if isinstance(ends := training.get("first_last_layers_bf16"), int):
        # Counted in layers, of which there are twice as many now.
        training = training | {"first_last_layers_bf16": 2 * ends}
    return data | {"model": model, "training": training}


def replacement(dotted: str, section: dict[str, Any]) -> str:
    """What to write instead of a field that recipes no longer have; empty for any other."""
    if dotted != _NUM_LAYERS:
        return ""
    return _hint(section.get("layer_pattern"), section["num_layers"])


def check_overrides(overrides: Sequence[str], inherited: str | None) -> None:
    """UserError if --set options state `model.num_layers`; `inherited` is the layer pattern of the recipe's files."""
    stated = {name.strip(): value.strip(" '\"") for name, _, value in (text.partition("=") for text in overrides)}
    if _NUM_LAYERS not in stated:
        return
    written = stated[_NUM_LAYERS]
    pattern = stated.get("model.layer_pattern") or _letters(inherited)
    hint = _hint(pattern, int(written) if written.isdecimal() else None)
    raise UserError(f"--set {_NUM_LAYERS}={written}: unknown key {_NUM_LAYERS!r}{hint}")


def _hint(pattern: object, count: object) -> str:
    if isinstance(pattern, str) and set(pattern) - {*"SA"}:
        remedy = f"remove {_NUM_LAYERS}"
    elif (translation := _written_out(pattern, count)) is not None:
        remedy = f"write only model.layer_pattern={translation!r}"
    else:
        remedy = f"write one such as {MODULE}"
    return f"; it follows from model.layer_pattern, which has one symbol per layer: {remedy}"


def _letters(pattern: str | None) -> str | None:
    """The pattern in S and A, if its layers are blocks; one period of it."""
    mixers = blocks(layers(pattern)) if pattern else None
    return mixers and repeated_part(mixers).translate({ord(STATE_SPACE): "S", ord(ATTENTION): "A"})


def _written_out(letters: object, count: object) -> str | None:
    """All layers in today's symbols; None if these are not letters and a number of an earlier recipe."""
    if not isinstance(letters, str) or not letters or set(letters) - {*"SA"}:
        return None
    if type(count) is not int or not 1 <= count <= _MOST:
        return None
    return from_letters((letters * count)[:count])
