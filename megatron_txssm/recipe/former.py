"""Recipes of versions in which a layer was a mixer and its FFN: S or A, repeated over `model.num_layers`."""

from typing import Any

from megatron_txssm.architecture.layer_pattern import MODULE, from_letters
from megatron_txssm.recipe.schema import SECTIONS


def translated(data: dict[str, Any]) -> dict[str, Any]:
    """A file's content; if it is a complete recipe as earlier runs kept it with their checkpoints, in today's terms."""
    model = data.get("model")
    if not isinstance(model, dict) or not set(SECTIONS) <= set(data) or "num_layers" not in model:
        return data
    model = dict(model)
    model["layer_pattern"] = _written_out(model["layer_pattern"], model.pop("num_layers"))
    training = data["training"]
    # Counted in layers, of which there are twice as many now.
    ends = {"first_last_layers_bf16": 2 * training.get("first_last_layers_bf16", 0)}
    return data | {"model": model, "training": training | ends}


def replacement(dotted: str, section: dict[str, Any]) -> str:
    """What to write instead of a field that recipes no longer have; empty for any other."""
    if dotted != "model.num_layers":
        return ""
    letters, count = section.get("layer_pattern", "SSSSSSSA"), section["num_layers"]
    known = isinstance(letters, str) and letters and not set(letters) - {*"SA"} and isinstance(count, int)
    example = f"model.layer_pattern={_written_out(letters, count)!r}" if known else f"such as {MODULE}"
    return f"; it follows from model.layer_pattern, which has one symbol per layer: write {example}"


def _written_out(letters: str, num_layers: int) -> str:
    return from_letters((letters * num_layers)[:num_layers])
