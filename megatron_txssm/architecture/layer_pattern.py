"""The layout of the layers as one string: `S` is a state-space layer, `A` an attention layer."""

from megatron_txssm.errors import UserError

STATE_SPACE = "S"
ATTENTION = "A"

# The paper's module: seven state-space sub-layers, then one self-attention sub-layer (arXiv:2506.09507, section 3).
DEFAULT_LAYER_PATTERN = "SSSSSSSA"


def layer_kinds(pattern: str, num_layers: int) -> str:
    """The kind of each of `num_layers` layers: `pattern`, repeated to this length.

    Returns a string of `num_layers` letters. Raises UserError if the pattern is empty, has letters other than `S` and
    `A`, or its length does not divide `num_layers`.
    """
    strangers = sorted(set(pattern) - {STATE_SPACE, ATTENTION})
    if not pattern or strangers:
        raise UserError(
            f"layer_pattern={pattern!r} must be letters {STATE_SPACE!r} (state-space) and {ATTENTION!r} (attention), "
            f"such as {DEFAULT_LAYER_PATTERN!r}" + (f"; found {', '.join(map(repr, strangers))}" if strangers else "")
        )
    if num_layers % len(pattern) != 0:
        nearest = max(1, num_layers // len(pattern)) * len(pattern)
        raise UserError(
            f"num_layers={num_layers} is not a multiple of the length of layer_pattern={pattern!r} ({len(pattern)}); "
            f"use num_layers={nearest} or write out a pattern of {num_layers} letters"
        )
    return pattern * (num_layers // len(pattern))
