"""The layout of the layers as one string, in the alphabet of Megatron's --hybrid-layer-pattern."""

import re

from megatron_txssm.errors import UserError

STATE_SPACE = "M"
ATTENTION = "*"
FFN = "-"
EXPERTS = "E"
# Between pipeline stages.
BORDER = "|"
# Before the layers of each depth of multi-token prediction, which follow the model's own.
DEPTH = "/"
LAYERS = {STATE_SPACE: "state-space", ATTENTION: "attention", FFN: "FFN", EXPERTS: "experts"}
# Megatron's other symbols.
UNSUPPORTED = {"G": "gated delta net", "+": "latent attention", "D": "sparse attention"}

# The paper's module: seven state-space sub-layers, then one self-attention sub-layer, each before an FFN
# (arXiv:2506.09507, section 3).
MODULE = "M-M-M-M-M-M-M-*-"


def stages(pattern: str) -> list[str]:
    """The model's layers in each pipeline stage, one symbol each; one stage if the pattern has no borders.

    Spaces and line breaks are ignored. UserError if the pattern is empty or has unknown symbols.
    """
    written, *_ = _parts(pattern)
    found = written.split(BORDER)
    if not all(found):
        raise UserError(
            f"layer_pattern={pattern!r} has {'no layers' if not written else f'a stage without layers at {BORDER!r}'}; "
            f"write one symbol per layer, such as {MODULE}"
        )
    return found


def prediction_depths(pattern: str) -> list[str]:
    """The layers of each depth of multi-token prediction; all depths have the same. UserError as for `stages`."""
    _, *depths = _parts(pattern)
    if not all(depths):
        mistake = f"no layers behind {DEPTH}; write those of a prediction depth, such as {DEPTH}{ATTENTION}{FFN}"
    elif any(BORDER in depth for depth in depths):
        mistake = (
            f"{BORDER} behind {DEPTH}; prediction depths are all in the last pipeline stage: leave {BORDER} out there"
        )
    elif len(set(depths)) > 1:
        mistake = (
            f"prediction depths with different layers ({', '.join(dict.fromkeys(depths))}); all have the same: "
            f"write {DEPTH}{depths[0]} {len(depths)} times"
        )
    else:
        return depths
    raise UserError(f"layer_pattern={pattern!r} has {mistake}")


def without_depths(pattern: str) -> str:
    """The pattern of the model without multi-token prediction, as written."""
    return pattern.partition(DEPTH)[0]


def check_pattern(pattern: str) -> None:
    """UserError unless the pattern is whole and legal, with a layer by which tokens see others."""
    if not {STATE_SPACE, ATTENTION} & set(layers(pattern)):
        raise UserError(f"layer_pattern={pattern!r} has no mixer; add {STATE_SPACE} or {ATTENTION}")
    prediction_depths(pattern)


def _parts(pattern: str) -> list[str]:
    """The model's own layers, then those of each prediction depth; UserError if there are unknown symbols."""
    written = "".join(pattern.split())
    if strangers := sorted(set(written) - {*LAYERS, BORDER, DEPTH}):
        raise UserError(f"layer_pattern={pattern!r}: {_advice(written, strangers)}")
    return written.split(DEPTH)


def _advice(written: str, strangers: list[str]) -> str:
    if not re.search("[^SA]", written):
        return (
            "S and A are now M and *, each with its FFN as a layer of its own (-): "
            f"write {from_letters(written)} once for each repetition"
        )
    if known := [f"{symbol} ({UNSUPPORTED[symbol]})" for symbol in strangers if symbol in UNSUPPORTED]:
        return f"{', '.join(known)} of Megatron's layers is not supported yet; use {_listed()}"
    return f"{', '.join(map(repr, strangers))} is no layer; use {_listed()}"


def _listed() -> str:
    listed = ", ".join(f"{symbol} ({name})" for symbol, name in LAYERS.items())
    return f"{listed}, {BORDER} between pipeline stages and {DEPTH} before a prediction depth"


def layers(pattern: str) -> str:
    """All layers of the model in order, one symbol each; without those of prediction depths."""
    return "".join(stages(pattern))


def blocks(layers: str) -> str | None:
    """The mixer of each block, if the layers are blocks of a mixer and an FFN or experts; None if they are not."""
    return layers[::2] if re.fullmatch(f"([{STATE_SPACE}{ATTENTION}][{FFN}{EXPERTS}])+", layers) else None


def repeated_part(layers: str) -> str:
    """The shortest part of which the layers are repetitions."""
    return next(layers[:n] for n in range(1, len(layers) + 1) if layers[:n] * (len(layers) // n) == layers)


def in_stages(pattern: str, count: int) -> str | None:
    """The pattern with borders for `count` pipeline stages, virtual ones included, and with its prediction depths.

    As written if it has borders for as many; without borders for one stage; otherwise divided evenly. None if that
    is impossible.
    """
    written = stages(pattern)
    whole = "".join(written)
    if count == 1:
        written = [whole]
    elif len(written) != count:
        if len(written) > 1 or len(whole) % count != 0:
            return None
        size = len(whole) // count
        written = [whole[start : start + size] for start in range(0, len(whole), size)]
    return DEPTH.join([BORDER.join(written), *prediction_depths(pattern)])


def from_letters(letters: str) -> str:
    """A pattern of earlier recipes, in which S and A were blocks of a mixer and an FFN, in today's symbols."""
    return letters.translate({ord("S"): STATE_SPACE + FFN, ord("A"): ATTENTION + FFN})
