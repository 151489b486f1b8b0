"""Checks transformers' generate(): the same tokens with and without a cache, alone and in a padded batch.

Logits of a single pass do not cover this: generate() passes cache, mask and positions under its own names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Tokens of the two texts, and number of new tokens for each.
LENGTHS, NEW_TOKENS = (24, 15), 8


@dataclass(frozen=True)
class Generation:
    """Greedy continuations of two texts, in each way that generate() supports."""

    new_tokens: int
    # In addition to the reference: each text alone, without a cache.
    ways: tuple[str, ...]
    # Way -> where it differs, or the exception.
    different: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.different

    def summary(self) -> str:
        if self.passed:
            ways = " and ".join(("without a cache", *self.ways))
            return f"generate  the same {self.new_tokens} tokens behind two texts {ways}"
        return "\n          ".join(("generate  NOT the same tokens", *(f"{w}: {d}" for w, d in self.different.items())))


def try_generate(model: "PreTrainedModel", tokens: list[int], tolerance: float) -> Generation:
    """Continue two texts from the start of `tokens`. Logits within `tolerance` are a tie, and either token is right."""
    first, second = LENGTHS
    texts = [tokens[:first], tokens[first : first + second]]
    cached = model.config.use_cache
    calls: dict[str, Callable[[], list[list[int]]]] = {"in a padded batch": lambda: _continue(model, texts, cached)[0]}
    if cached:
        calls["with a cache"] = lambda: [_continue(model, [text], True)[0][0] for text in texts]
    # Without a cache, each token is one pass over all tokens before it.
    alone = [_continue(model, [text], False) for text in texts]
    different: dict[str, str] = {}
    for way, call in calls.items():
        try:
            rows = call()
        except Exception as error:  # a model may raise anything
            different[way] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        for n, (row, ([wanted], [logits_LV])) in enumerate(zip(rows, alone, strict=True), start=1):
            if fault := _first_difference(row, wanted, logits_LV, tolerance):
                different.setdefault(way, f"text {n}, {fault}")
    return Generation(NEW_TOKENS, tuple(calls), different)


def _first_difference(row: list[int], wanted: list[int], logits_LV: "torch.Tensor", tolerance: float) -> str | None:
    for place, (token, right) in enumerate(zip(row, wanted, strict=True)):
        if token != right:
            tie = bool(logits_LV[place, right] - logits_LV[place, token] <= tolerance)
            return None if tie else f"new token {place + 1} is {token}, not {right}"
    return None


def _continue(model: Any, texts: list[list[int]], use_cache: bool) -> "tuple[list[list[int]], torch.Tensor]":
    """The new tokens of each text, and the logits that they were chosen from, [text, new token, vocabulary]."""
    import torch

    longest = max(map(len, texts))
    ids_BL = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask_BL = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    # Overrides the folder's generation_config.json; an end-of-text token does not stop generation.
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    made = model.generate(
        ids_BL,
        attention_mask=mask_BL,
        use_cache=use_cache,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return made.sequences[:, longest:].tolist(), torch.stack(made.logits, dim=1)
