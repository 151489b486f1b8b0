"""generate(): the cache changes speed but no tokens; options that cannot work with states are rejected."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from megatron_txssm.hf import TransXSSMCache
from tests.hf.tiny import VARIANTS, generate, padded_left, random_ids, tiny_config, tiny_model

variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
def test_greedy_tokens_are_the_same_with_and_without_the_cache(variant: str) -> None:
    """256 tokens of four rows with different padding on the left."""
    model, (ids, mask) = tiny_model(variant), padded_left()
    # No repeated pair of tokens: texts that loop would prove little.
    options = {"max_new_tokens": 256, "no_repeat_ngram_size": 2}
    cached = generate(model, ids, mask, **options)
    assert torch.equal(cached, generate(model, ids, mask, use_cache=False, **options))
    assert cached.shape == (4, 40 + 256)
    assert all(len(row.unique()) > 10 for row in cached[:, -64:])


@variants
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "top_k": 20},
    ],
    ids=["beams", "best beams", "samples", "sampled beams"],
)
def test_beams_and_samples_are_the_same_with_and_without_the_cache(variant: str, options: dict[str, Any]) -> None:
    model, (ids, mask) = tiny_model(variant), padded_left()
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generate(model, ids, mask, max_new_tokens=24, eos_token_id=5, use_cache=use_cache, **options))
    assert torch.equal(*results)
    assert len(results[0]) == len(ids) * options.get("num_return_sequences", 1)


@variants
@pytest.mark.parametrize("all_tokens", [True, False], ids=["all tokens again", "new tokens alone"])
def test_generation_goes_on_from_a_returned_cache(variant: str, all_tokens: bool) -> None:
    """A second turn: the first turn's tokens and some of the user's, padded on the left."""
    model, (ids, mask) = tiny_model(variant), padded_left()
    first = generate(model, ids, mask, max_new_tokens=10, return_dict_in_generate=True)
    text = torch.cat([first.sequences, random_ids(len(ids), 7, seed=1)], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(ids), 17)], dim=1)
    expected = generate(model, text, mask, max_new_tokens=20)
    # The last token of the first turn was not yet read.
    assert first.past_key_values.get_seq_length() == ids.shape[1] + 9
    given = text if all_tokens else text[:, ids.shape[1] + 9 :]
    tokens = generate(model, given, mask, max_new_tokens=20, past_key_values=first.past_key_values)
    assert torch.equal(tokens[:, given.shape[1] :], expected[:, text.shape[1] :])


@variants
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prefill_in_chunks_changes_no_token(variant: str, chunk: int) -> None:
    model, (ids, mask) = tiny_model(variant), padded_left()
    options = {"max_new_tokens": 24, "output_logits": True, "return_dict_in_generate": True}
    expected = generate(model, ids, mask, **options)
    chunked = generate(model, ids, mask, prefill_chunk_size=chunk, **options)
    assert torch.equal(chunked.sequences, expected.sequences)
    torch.testing.assert_close(chunked.logits, expected.logits, rtol=0, atol=1e-4)


@variants
def test_generation_from_embeddings(variant: str) -> None:
    model, (ids, mask) = tiny_model(variant), padded_left()
    embeddings = model.get_input_embeddings()(ids)
    tokens = generate(model, None, mask, inputs_embeds=embeddings, max_new_tokens=12)
    assert torch.equal(tokens, generate(model, ids, mask, max_new_tokens=12)[:, ids.shape[1] :])


def test_generation_makes_our_cache_and_takes_one() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    result = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(result.past_key_values, TransXSSMCache)
    cache = TransXSSMCache(model.config)
    assert torch.equal(generate(model, ids, max_new_tokens=4, past_key_values=cache), result.sequences)
    assert cache.get_seq_length() == 9 + 3


@variants
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 7}],
    ids=["greedy", "beams", "samples", "prefill in chunks"],
)
def test_a_static_cache_changes_no_token(variant: str, options: dict[str, Any]) -> None:
    model, (ids, mask) = tiny_model(variant), padded_left()
    results = []
    for implementation in ("dynamic", "static"):
        torch.manual_seed(3)
        options = options | {"return_dict_in_generate": True, "no_repeat_ngram_size": 2}
        results.append(generate(model, ids, mask, max_new_tokens=32, cache_implementation=implementation, **options))
    assert torch.equal(*(result.sequences for result in results))
    assert [result.past_key_values.max_cache_len for result in results] == [None, 40 + 32 - 1]


@pytest.mark.parametrize("given", ["embeddings", "no padding"])
def test_a_static_cache_without_ids_or_without_a_mask(given: str) -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    expected = generate(model, ids, max_new_tokens=12)[:, 9:]
    options: dict[str, Any] = {"max_new_tokens": 12, "cache_implementation": "static"}
    if given == "embeddings":
        tokens = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids), **options)
    else:
        tokens = generate(model, ids, **options)
    assert torch.equal(tokens[:, -12:], expected)


def test_a_static_cache_is_as_large_as_the_largest_before() -> None:
    """Graphs were compiled for that size."""
    model, ids = tiny_model(), random_ids(1, 9)
    options = {"cache_implementation": "static", "return_dict_in_generate": True}
    for max_new_tokens, max_cache_len, expected in ((4, None, 12), (8, 40, 40), (4, None, 40)):
        result = generate(model, ids, max_new_tokens=max_new_tokens, max_cache_len=max_cache_len, **options)
        assert result.past_key_values.max_cache_len == expected


@variants
@pytest.mark.parametrize("all_tokens", [True, False], ids=["all tokens again", "new tokens alone"])
def test_generation_goes_on_from_a_static_cache(variant: str, all_tokens: bool) -> None:
    model, (ids, mask) = tiny_model(variant), padded_left()
    cache = TransXSSMCache(model.config, max_cache_len=40 + 17 + 19)
    first = generate(model, ids, mask, max_new_tokens=10, past_key_values=cache)
    text = torch.cat([first, random_ids(len(ids), 7, seed=1)], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(ids), 17)], dim=1)
    expected = generate(model, text, mask, max_new_tokens=20)
    given = text if all_tokens else text[:, 49:]
    tokens = generate(model, given, mask, max_new_tokens=20, past_key_values=cache)
    assert torch.equal(tokens[:, given.shape[1] :], expected[:, text.shape[1] :])


def test_a_static_cache_that_would_overflow_is_refused() -> None:
    model, ids = tiny_model(), random_ids(1, 9)
    cache = TransXSSMCache(model.config, max_cache_len=12)
    assert generate(model, ids, max_new_tokens=4, past_key_values=cache).shape == (1, 13)
    with pytest.raises(ValueError, match=r"max_cache_len=12 of the cache is less than the 13 tokens .* make it larger"):
        generate(model, ids, max_new_tokens=5, past_key_values=TransXSSMCache(model.config, max_cache_len=12))


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static", "quantized"])
def test_caches_without_states_are_refused_by_name(implementation: str) -> None:
    with pytest.raises(ValueError, match=rf"cache_implementation='{implementation}' .* no states .* leave it out"):
        generate(tiny_model(), random_ids(1, 9), max_new_tokens=4, cache_implementation=implementation)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("variant", ["transxssm", "mamba2"])
def test_caches_without_states_are_refused_as_objects(kind: Any, variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(1, 9)
    options: dict[str, Any] = {"max_cache_len": 32} if kind is StaticCache else {}
    message = rf"the cache is a {kind.__name__}, .* use TransXSSMCache\(model.config\)"
    with pytest.raises(TypeError, match=message):
        model(ids, past_key_values=kind(config=model.config, **options))
    with pytest.raises(TypeError, match=message):
        generate(model, ids, max_new_tokens=4, past_key_values=kind(config=model.config, **options))


def test_assisted_generation_is_refused() -> None:
    """A rejected guess would have to be removed from the states."""
    model, ids = tiny_model(), random_ids(1, 9)
    ways: list[dict[str, Any]] = [{"assistant_model": tiny_model("jamba")}, {"prompt_lookup_num_tokens": 3}]
    for options in ways:
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            generate(model, ids, max_new_tokens=4, **options)


def test_a_mask_that_does_not_cover_the_cache_is_refused() -> None:
    model, ids = tiny_model(), random_ids(1, 9)
    cache = TransXSSMCache(tiny_config())
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask.shape=\[1, 9\] does not fit 9 tokens .* use \[batch, 18\]"):
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
