"""forward's arguments: the cache under two names, arguments passed to every model; unknown ones are rejected."""

from typing import Any

import pytest
import torch

from megatron_txssm.hf import CACHE_NAME, TransXSSMCache
from megatron_txssm.hf.arguments_transxssm import KNOWN_ARGUMENTS
from tests.hf.tiny import VARIANTS, generate, padded_left, random_ids, tiny_model, worst_difference

NAMES = ("cache", "past_key_values")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", [True, False], ids=["with head", "without head"])
@torch.no_grad()
def test_the_cache_has_two_names(name: str, head: bool) -> None:
    model, ids = tiny_model(), random_ids(1, 20)
    forward: Any = model if head else model.model
    cache: Any = TransXSSMCache(model.config)
    for part in ids.split([15, 5], dim=1):
        output = forward(part, **{name: cache})
    assert cache.get_seq_length() == 20
    assert torch.allclose(output[0], forward(ids)[0][:, 15:], atol=1e-4)
    assert output.past_key_values is cache and output[CACHE_NAME] is cache


def test_two_caches_are_refused() -> None:
    model, ids = tiny_model(), random_ids(1, 4)
    first, second = TransXSSMCache(model.config), TransXSSMCache(model.config)
    with pytest.raises(ValueError, match="two names for one cache; give one of them"):
        model(ids, cache=first, past_key_values=second)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cahce", 1),
        ("cache_params", TransXSSMCache(tiny_model().config)),
        ("head_mask", torch.ones(4)),
        ("softcap", 30.0),
        ("sliding_window", 8),
        ("attention_instances", {}),
        ("is_causal", False),
    ],
)
@pytest.mark.parametrize("head", [True, False], ids=["with head", "without head"])
def test_an_argument_that_would_be_lost_is_refused(name: str, value: Any, head: bool) -> None:
    model: Any = tiny_model() if head else tiny_model().model
    with pytest.raises(TypeError, match=rf"{name}.* leave (it|the argument) out"):
        model(random_ids(1, 9), **{name: value})


@torch.no_grad()
def test_what_every_model_is_given_changes_nothing() -> None:
    """As from Trainer, TRL, PEFT and older callers; None is accepted under any name."""
    model, ids = tiny_model(), random_ids(2, 9)
    plain = model(ids).logits
    given: dict[str, Any] = dict.fromkeys(KNOWN_ARGUMENTS) | {
        "num_items_in_batch": torch.tensor(16),
        "output_router_logits": False,
        "return_dict": True,
        "is_causal": True,
        "deterministic": True,
        "cache_position": torch.arange(9),
        "token_type_ids": torch.zeros_like(ids),
        "encoder_outputs": None,
    }
    assert torch.equal(model(ids, **given).logits, plain)


def test_a_cache_under_gradient_checkpointing_is_refused() -> None:
    model, ids = tiny_model().train(), random_ids(1, 9)
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="a cache would take its tokens twice; leave the cache out"):
        model(ids, past_key_values=TransXSSMCache(model.config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_in_training_generates_what_it_does_in_evaluation(variant: str) -> None:
    """With gradient checkpointing on, as trainers that sample leave it."""
    model, (ids, mask) = tiny_model(variant), padded_left()
    expected = generate(model, ids, mask, max_new_tokens=12)
    model.train().activation_checkpointing_enable()
    assert torch.equal(generate(model, ids, mask, max_new_tokens=12), expected)


@torch.no_grad()
def test_a_mask_counts_whatever_is_not_zero() -> None:
    """Some packers put document numbers into it."""
    model, ids = tiny_model("jamba"), random_ids(1, 20)
    mask = torch.ones_like(ids)
    mask[:, 8:] = 3
    assert worst_difference(model(ids, attention_mask=mask).logits, model(ids).logits) < 2e-5
