"""TransXSSMCache under forward: any split of a text gives the same logits; the cache's contents and size."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from megatron_txssm.hf import TransXSSMCache, TransXSSMForCausalLM
from megatron_txssm.hf.cache_transxssm import BLOCK_TOKENS, AttentionCacheLayer, StateSpaceCacheLayer
from tests.hf.attention_kernels import use_attention
from tests.hf.tiny import VARIANTS, padded_left, random_ids, tiny_config, tiny_model, worst_difference

# Absolute, of logits around 5, in fp32.
TOLERANCE = 1e-4
variants = pytest.mark.parametrize("variant", VARIANTS)
# A growing cache, and static ones: as long as these tests' longest text, and longer.
rooms = pytest.mark.parametrize("max_cache_len", [None, 40, 64], ids=["grows", "static", "longer"])
with_attention = pytest.mark.parametrize("variant", ["transxssm", "jamba"])


def in_parts(
    model: TransXSSMForCausalLM,
    ids: Tensor,
    lengths: list[int],
    mask: Tensor | None = None,
    max_cache_len: int | None = None,
) -> tuple[Tensor, TransXSSMCache]:
    """Logits of a text read part by part, and the final cache."""
    cache, logits, seen = TransXSSMCache(model.config, max_cache_len), [], 0
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
@rooms
@torch.no_grad()
def test_padded_rows_in_parts_equal_one_pass(variant: str, max_cache_len: int | None) -> None:
    """Some parts consist only of padding in some rows."""
    model, (ids, mask) = tiny_model(variant), padded_left()
    logits, _ = in_parts(model, ids, [1, 9, 1, 12, 16, 1], mask, max_cache_len)
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
    """Neither the logits before it nor the states after it: padding neither adds to a state nor decays it."""
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
@rooms
@pytest.mark.parametrize("lengths", [[20, 1, 1, 8], [20, 10], [13, 7, 10], [30]], ids=str)
@torch.no_grad()
def test_padding_between_tokens_changes_nothing(variant: str, lengths: list[int], max_cache_len: int | None) -> None:
    """A prompt padded on the right, then more tokens; shorter rows, and one whose prompt is only padding."""
    model, ids = tiny_model(variant), random_ids(4, 30)
    mask = torch.ones_like(ids)
    for row, begin in enumerate((14, 11, 1, 0)):
        mask[row, begin:20] = 0
    logits, _ = in_parts(model, ids, lengths, mask, max_cache_len)
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, real]).logits[0]
        assert worst_difference(logits[row, real], alone) < TOLERANCE, row


@variants
def test_gradients_flow_through_the_cache(variant: str) -> None:
    """Two halves of a text, linked by the cache, have the gradients of the whole."""
    model, ids = tiny_model(variant), random_ids(2, 40)
    gradients = []
    for logits in (model(ids, use_cache=False).logits, in_parts(model, ids, [19, 21])[0]):
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for whole, halves in zip(*gradients, strict=True):
        assert worst_difference(halves, whole) < 1e-4 * whole.abs().max()


@variants
@rooms
@torch.no_grad()
def test_a_copy_goes_its_own_way(variant: str, max_cache_len: int | None) -> None:
    model, ids = tiny_model(variant), random_ids(1, 30)
    _, cache = in_parts(model, ids[:, :20], [20], max_cache_len=max_cache_len)
    kept = copy.deepcopy(cache)
    # A step of one token and a step of several, each followed by other tokens.
    for tokens in (random_ids(1, 1, seed=1), random_ids(1, 9, seed=2)):
        model(tokens, past_key_values=cache)
    assert kept.get_seq_length() == 20 and cache.get_seq_length() == 30
    logits = model(ids[:, 20:], past_key_values=kept).logits
    assert worst_difference(logits, model(ids).logits[:, 20:]) < TOLERANCE


@variants
@rooms
@torch.no_grad()
def test_rows_are_selected_repeated_and_reordered(variant: str, max_cache_len: int | None) -> None:
    model, ids = tiny_model(variant), random_ids(3, 24)
    expected = model(ids).logits[:, 16:]
    for name, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ):
        _, cache = in_parts(model, ids[:, :16], [16], max_cache_len=max_cache_len)
        getattr(cache, name)(argument)
        logits = model(ids[rows, 16:], past_key_values=cache).logits
        assert worst_difference(logits, expected[rows]) < TOLERANCE, name


@variants
@rooms
@torch.no_grad()
def test_after_a_reset_the_cache_is_as_new(variant: str, max_cache_len: int | None) -> None:
    model, ids = tiny_model(variant), random_ids(2, 20)
    _, cache = in_parts(model, random_ids(2, 33, seed=1), [33], max_cache_len=max_cache_len)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert worst_difference(model(ids, past_key_values=cache).logits, model(ids).logits) < TOLERANCE


def test_crop_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be rolled back; keep a copy.deepcopy"):
        TransXSSMCache(tiny_config()).crop(-1)


def stored(tensors: list[Tensor | None]) -> int:
    """Bytes of storage that tensors keep alive, which for views exceeds their own size."""
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


def copying_cache(model: TransXSSMForCausalLM) -> TransXSSMCache:
    """Our cache with transformers' own layers for keys and values, which copy everything at each token."""
    cache = TransXSSMCache(model.config)
    cache.layers = [DynamicLayer() if isinstance(layer, AttentionCacheLayer) else layer for layer in cache.layers]
    return cache


@with_attention
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_written_in_place_or_copied_the_bits_are_the_same(variant: str, attention: str) -> None:
    """Across two block boundaries."""
    model, ids = tiny_model(variant, attn_implementation=attention), random_ids(2, 2 * BLOCK_TOKENS + 40)
    ours, copying = TransXSSMCache(model.config), copying_cache(model)
    for part in ids.split([30, BLOCK_TOKENS - 50, 1, 40] + [1] * (ids.shape[1] - 21 - BLOCK_TOKENS), dim=1):
        logits = [model(part, past_key_values=cache).logits for cache in (ours, copying)]
        assert torch.equal(*logits), ours.get_seq_length()


@torch.no_grad()
def test_keys_and_values_are_copied_once_in_a_block() -> None:
    model, ids = tiny_model(), random_ids(2, 2 * BLOCK_TOKENS + 20)
    _, cache = in_parts(model, ids[:, :10], [10])
    layer: Any = cache.layers[1]
    exact = layer.nbytes()
    moved, before = [], ()
    for token in range(10, ids.shape[1]):
        model(ids[:, token : token + 1], past_key_values=cache)
        places = layer.keys.data_ptr(), layer.values.data_ptr()
        if places != before:
            moved.append(token)
        before = places
        assert layer.nbytes() == exact // 10 * -(-(token + 1) // BLOCK_TOKENS) * BLOCK_TOKENS
    assert moved == [10, BLOCK_TOKENS, 2 * BLOCK_TOKENS]


def test_whatever_is_done_to_keys_and_values_they_are_those_of_a_layer_that_copies() -> None:
    """And tensors that a layer has returned do not change."""
    torch.manual_seed(0)
    ours, copying = AttentionCacheLayer(), DynamicLayer()
    shown: list[tuple[Tensor, Tensor]] = []

    def append(tokens: int, batch: int, dtype: torch.dtype = torch.float32) -> None:
        states = [torch.randn(batch, 2, tokens, 4, dtype=dtype) for _ in range(2)]
        for actual, expected in zip(ours.update(*states), copying.update(*states), strict=True):
            assert torch.equal(actual, expected) and actual.dtype == expected.dtype
            shown.append((actual, actual.clone()))

    steps: list[tuple[str, Any]] = [
        ("reorder_cache", torch.tensor([2, 0, 0])),
        ("crop", -7),
        ("batch_repeat_interleave", 2),
        ("reorder_cache", torch.tensor([5, 0, 1, 2, 3, 3])),
        ("crop", 0),
        ("batch_select_indices", torch.tensor([4, 1])),
        ("reset", None),
        ("reorder_cache", torch.tensor([1, 0])),
    ]
    with torch.no_grad():
        for tokens in (20, 1, 3):
            append(tokens, 3)
        batch = 3
        for name, argument in steps:
            for layer in (ours, copying):
                getattr(layer, name)(*() if argument is None else (argument,))
            batch = {"batch_repeat_interleave": 6, "batch_select_indices": 2}.get(name, batch)
            for tokens in (2, 1, 1):
                append(tokens, batch)
            kept: Any = copy.deepcopy(ours)
            append(1, batch)
            assert torch.equal(kept.keys, shown[-2][0][:, :, :-1]) and kept.nbytes() == ours.nbytes()
        append(1, batch, torch.float64)
        append(1, batch)
    for tensor, then in shown:
        assert torch.equal(tensor, then)


def test_gradients_flow_where_keys_have_none() -> None:
    """As with an adapter on the queries only: attention saves keys and values for its backward pass."""
    model, ids = tiny_model(num_hidden_layers=1, layer_types=["full_attention"]), random_ids(1, 12)
    model.requires_grad_(False)
    query = model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_()
    gradients = []
    for lengths in ([12], [9, 1, 1, 1]):
        logits, _ = in_parts(model, ids, lengths)
        gradients += torch.autograd.grad(logits.square().sum(), [query])
    assert worst_difference(gradients[1], gradients[0]) < 1e-4 * gradients[0].abs().max()


def test_a_cache_of_inference_mode_goes_on_outside() -> None:
    model, ids = tiny_model(), random_ids(1, 12)
    cache = TransXSSMCache(model.config)
    for part, mode in zip(
        ids.split([9, 1, 1, 1], dim=1),
        (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode),
        strict=True,
    ):
        with mode():
            logits = model(part, past_key_values=cache).logits
    assert worst_difference(logits, model(ids).logits[:, -1:]) < TOLERANCE


def grown_layer(rows: int = 2) -> AttentionCacheLayer:
    """A layer with spare places after its 10 tokens."""
    layer = AttentionCacheLayer()
    for tokens in (9, 1):
        layer.update(*torch.randn(2, rows, 2, tokens, 8))
    return layer


def test_reordered_in_inference_mode_it_goes_on_outside() -> None:
    with torch.inference_mode():
        layer = grown_layer()
        layer.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        keys, _ = layer.update(*torch.randn(2, 2, 2, 1, 8))
    assert keys.shape[2] == 11


@torch.no_grad()
def test_copies_that_share_their_tensors_overwrite_nothing() -> None:
    layer = grown_layer()
    one, other = copy.copy(layer), copy.copy(layer)
    keys, values = one.update(*torch.randn(2, 2, 2, 1, 8))
    shown = keys.clone(), values.clone()
    other.update(*torch.randn(2, 2, 2, 1, 8))
    assert torch.equal(keys, shown[0]) and torch.equal(values, shown[1])


@torch.no_grad()
def test_rows_that_were_selected_leave_the_room_of_all() -> None:
    layer = grown_layer(rows=8)
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.nbytes() == 2 * 2 * 10 * 8 * 4 and not layer.rooms


@variants
@torch.no_grad()
def test_in_a_static_cache_nothing_moves_or_grows(variant: str) -> None:
    """Nor when rows are reordered."""
    model, ids = tiny_model(variant), random_ids(2, 30)
    _, cache = in_parts(model, ids[:, :20], [20], max_cache_len=64)

    def places() -> list[int]:
        layers: list[Any] = cache.layers
        tensors = [cache.seen_tokens]
        for layer in layers:
            if isinstance(layer, StateSpaceCacheLayer):
                tensors += [tensor for tensor in (layer.state_BHPN, layer.history_BEK) if tensor is not None]
            else:
                assert layer.keys.shape[2] == layer.values.shape[2] == 64
                tensors += [layer.keys, layer.values]
        return [tensor.data_ptr() for tensor in tensors]

    before, size = places(), cache.nbytes()
    for token in ids[:, 20:].split(1, dim=1):
        model(token, past_key_values=cache)
        order: Any = torch.tensor([1, 0])
        cache.reorder_cache(order)
    assert places() == before and cache.nbytes() == size and cache.is_compileable


@torch.no_grad()
def test_a_mask_of_all_places_of_a_static_cache_is_the_growing_one() -> None:
    """Whatever its values at empty places."""
    model, (ids, mask) = tiny_model("jamba"), padded_left()
    results = []
    for fill in (0, 1):
        whole = torch.nn.functional.pad(mask, (0, 24), value=fill)
        cache = TransXSSMCache(model.config, 64)
        parts = [model(part, attention_mask=whole, past_key_values=cache).logits for part in ids.split([30, 9, 1], 1)]
        results.append(torch.cat(parts, dim=1))
    growing, _ = in_parts(model, ids, [30, 9, 1], mask, 64)
    assert torch.equal(results[0][mask.bool()], growing[mask.bool()])
    assert torch.equal(results[1][mask.bool()], growing[mask.bool()])


def test_what_a_static_cache_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), random_ids(1, 12)
    only_states, only_attention, only_values = (
        tiny_model("mamba2"),
        *(tiny_model(num_hidden_layers=1, layer_types=["full_attention"]) for _ in range(2)),
    )
    only_values.requires_grad_(False)
    only_values.get_parameter("model.layers.0.self_attn.v_proj.weight").requires_grad_()
    for refusing in (only_states, only_attention, only_values):
        with pytest.raises(ValueError, match=r"a backward pass would need; compute under torch.no_grad"):
            refusing(ids, past_key_values=TransXSSMCache(refusing.config, 16))
    with torch.no_grad():
        with pytest.raises(ValueError, match="a static cache does not support packed documents"):
            model(ids, seq_idx=(torch.arange(12) // 5)[None], past_key_values=TransXSSMCache(model.config, 16))
        cache = TransXSSMCache(model.config, 16)
        model(ids, past_key_values=cache)
        with pytest.raises(IndexError):
            model(ids, past_key_values=cache)
        use_attention(model, "flash_attention_2", monkeypatch)
        with pytest.raises(ValueError, match=r"'flash_attention_2' would attend to the empty places .* use 'sdpa'"):
            model(ids, past_key_values=TransXSSMCache(model.config, 16))


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_a_static_cache_under_other_attention(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = tiny_model(), padded_left()
    expected = model(ids, attention_mask=mask).logits
    use_attention(model, implementation, monkeypatch)
    logits, _ = in_parts(model, ids, [29, 10, 1], mask, 48)
    assert worst_difference(logits[mask.bool()], expected[mask.bool()]) < TOLERANCE
