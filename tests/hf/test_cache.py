"""TransXSSMCache under forward: any division of a text gives the same logits; what it holds, and how much."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_txssm.hf import TransXSSMCache, TransXSSMForCausalLM
from megatron_txssm.hf.cache_transxssm import StateSpaceCacheLayer
from tests.hf.tiny import VARIANTS, padded_left, random_ids, tiny_config, tiny_model, worst_difference

# Absolute, of logits around 5, in fp32.
TOLERANCE = 1e-4
variants = pytest.mark.parametrize("variant", VARIANTS)


def in_parts(
    model: TransXSSMForCausalLM, ids: Tensor, lengths: list[int], mask: Tensor | None = None
) -> tuple[Tensor, TransXSSMCache]:
    """Logits of a text that is read part by part, and the cache behind it."""
    cache, logits, seen = TransXSSMCache(model.config), [], 0
    for part in ids.split(lengths, dim=1):
        seen += part.shape[1]
        part_mask = None if mask is None else mask[:, :seen]
        logits.append(model(part, attention_mask=part_mask, past_key_values=cache).logits)
    return torch.cat(logits, dim=1), cache


@variants
@torch.no_grad()
def test_a_long_text_in_uneven_parts_equals_one_pass(variant: str) -> None:
    model, ids = tiny_model(variant, chunk_size=64), random_ids(1, 2048)
    lengths = [1, 700, 2, 1, 1, 63, 64, 300, 900, 15, 1]
    logits, cache = in_parts(model, ids, lengths)
    assert worst_difference(logits, model(ids, use_cache=False).logits) < TOLERANCE
    assert cache.get_seq_length() == sum(lengths) == 2048


@variants
@torch.no_grad()
def test_padded_rows_in_parts_equal_one_pass(variant: str) -> None:
    """Some parts are padding alone for some rows."""
    model, (ids, mask) = tiny_model(variant), padded_left()
    logits, _ = in_parts(model, ids, [1, 9, 1, 12, 16, 1], mask)
    expected = model(ids, attention_mask=mask).logits
    assert worst_difference(logits[mask.bool()], expected[mask.bool()]) < TOLERANCE


@variants
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(variant: str) -> None:
    model, (ids, mask) = tiny_model(variant), padded_left()
    logits = model(ids, attention_mask=mask).logits
    for row, padding in enumerate((0, 3, 11, 20)):
        alone = model(ids[row : row + 1, padding:]).logits
        assert worst_difference(logits[row : row + 1, padding:], alone) < TOLERANCE


@variants
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(variant: str) -> None:
    """Neither the logits before it nor, as it adds nothing to a state and decays nothing, the states behind it."""
    model, ids = tiny_model(variant), random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 21:] = 0
    padded, alone = TransXSSMCache(model.config), TransXSSMCache(model.config)
    logits = model(ids, attention_mask=mask, past_key_values=padded).logits
    expected = model(ids[:1, :21], past_key_values=alone).logits
    assert worst_difference(logits[:1, :21], expected) < TOLERANCE
    for layer, layer_alone in zip(padded.layers, alone.layers, strict=True):
        if isinstance(layer, StateSpaceCacheLayer) and isinstance(layer_alone, StateSpaceCacheLayer):
            assert layer.state_BHPN is not None and layer_alone.state_BHPN is not None
            assert worst_difference(layer.state_BHPN[:1], layer_alone.state_BHPN) < TOLERANCE


@variants
@pytest.mark.parametrize("lengths", [[20, 1, 1, 8], [20, 10], [13, 7, 10], [30]], ids=str)
@torch.no_grad()
def test_padding_between_tokens_changes_nothing(variant: str, lengths: list[int]) -> None:
    """A prompt with padding on the right, then more tokens; shorter rows, and one that is padding alone until then."""
    model, ids = tiny_model(variant), random_ids(4, 30)
    mask = torch.ones_like(ids)
    for row, begin in enumerate((14, 11, 1, 0)):
        mask[row, begin:20] = 0
    logits, _ = in_parts(model, ids, lengths, mask)
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, real]).logits[0]
        assert worst_difference(logits[row, real], alone) < TOLERANCE, row


@variants
def test_gradients_flow_through_the_cache(variant: str) -> None:
    """Two halves of a text with the cache between them have the gradients of the whole."""
    model, ids = tiny_model(variant), random_ids(2, 40)
    gradients = []
    for logits in (model(ids, use_cache=False).logits, in_parts(model, ids, [19, 21])[0]):
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for whole, halves in zip(*gradients, strict=True):
        assert worst_difference(halves, whole) < 1e-4 * whole.abs().max()


@variants
@torch.no_grad()
def test_a_copy_goes_its_own_way(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(1, 30)
    _, cache = in_parts(model, ids[:, :20], [20])
    kept = copy.deepcopy(cache)
    # A step by one token and a step by several, which other tokens follow.
    for tokens in (random_ids(1, 1, seed=1), random_ids(1, 9, seed=2)):
        model(tokens, past_key_values=cache)
    assert kept.get_seq_length() == 20 and cache.get_seq_length() == 30
    logits = model(ids[:, 20:], past_key_values=kept).logits
    assert worst_difference(logits, model(ids).logits[:, 20:]) < TOLERANCE


@variants
@torch.no_grad()
def test_rows_are_selected_repeated_and_reordered(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(3, 24)
    expected = model(ids).logits[:, 16:]
    for name, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ):
        _, cache = in_parts(model, ids[:, :16], [16])
        getattr(cache, name)(argument)
        logits = model(ids[rows, 16:], past_key_values=cache).logits
        assert worst_difference(logits, expected[rows]) < TOLERANCE, name


@variants
@torch.no_grad()
def test_after_a_reset_the_cache_is_as_new(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(2, 20)
    _, cache = in_parts(model, random_ids(2, 33, seed=1), [33])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert worst_difference(model(ids, past_key_values=cache).logits, model(ids).logits) < TOLERANCE


def test_crop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be rolled back; keep a copy.deepcopy"):
        TransXSSMCache(tiny_config()).crop(-1)


def stored(tensors: list[Tensor | None]) -> int:
    """Bytes of memory that tensors keep alive, which is more than their own where they are views."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


@variants
@torch.no_grad()
def test_states_do_not_grow_and_keys_grow_by_the_token(variant: str) -> None:
    model = tiny_model(variant)
    state_bytes, all_bytes = [], []
    for length in (16, 64, 65, 256):
        _, cache = in_parts(model, random_ids(2, length), [length])
        layers = [layer for layer in cache.layers if isinstance(layer, StateSpaceCacheLayer)]
        state_bytes.append(sum(stored([layer.state_BHPN, layer.history_BEK]) for layer in layers))
        all_bytes.append(cache.nbytes())
    config = model.config
    assert len(set(state_bytes)) == 1
    state = 2 * config.state_inner_size * config.state_size * 4
    conv = config.position_encoding == "conv1d_d"
    history = 2 * (config.in_proj_sizes["x"] + 2 * config.in_proj_sizes["B"]) * (config.conv_kernel - 1) * 4 * conv
    kinds = config.layer_types or []
    assert state_bytes[0] == kinds.count("linear_attention") * (state + history)
    per_token = kinds.count("full_attention") * 2 * 2 * (config.num_key_value_heads or 0) * (config.head_dim or 0) * 4
    assert [total - state_bytes[0] for total in all_bytes] == [n * per_token for n in (16, 64, 65, 256)]


@torch.no_grad()
def test_states_are_fp32_in_a_bf16_model() -> None:
    model = tiny_model("jamba").bfloat16()
    _, cache = in_parts(model, random_ids(1, 20), [18, 1, 1])
    states: Any = cache.layers[0]
    keys: Any = cache.layers[1]
    assert states.state_BHPN.dtype == torch.float32
    assert states.history_BEK.dtype == keys.keys.dtype == torch.bfloat16
