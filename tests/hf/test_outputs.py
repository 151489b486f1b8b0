"""transformers' conventions for forward: embeddings, hidden states, weights, attention implementations."""

import pytest
import torch

from tests.hf.tiny import VARIANTS, padded_left, random_ids, tiny_model, worst_difference

variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
@torch.no_grad()
def test_eager_attention_and_sdpa_agree(variant: str) -> None:
    model, (ids, mask) = tiny_model(variant), padded_left()
    logits = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        logits.append((model(ids, attention_mask=mask).logits[mask.bool()], model(ids).logits))
    for of_sdpa, of_eager in zip(*logits, strict=True):
        assert worst_difference(of_eager, of_sdpa) < 2e-5


@variants
@torch.no_grad()
def test_hidden_states_and_attention_weights_are_given_on_request(variant: str) -> None:
    model, ids = tiny_model(variant, attn_implementation="eager"), random_ids(2, 20)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    # Only attention layers have weights.
    assert len(output.attentions) == (model.config.layer_types or []).count("full_attention")
    for weights_BHLL in output.attentions:
        assert weights_BHLL.shape == (2, 4, 20, 20)
        assert not weights_BHLL.triu(1).any()
        torch.testing.assert_close(weights_BHLL.sum(-1), torch.ones(2, 4, 20))
    plain = model(ids)
    assert plain.hidden_states is None and plain.attentions is None
    assert torch.equal(plain.logits, output.logits)


@variants
@torch.no_grad()
def test_embeddings_serve_in_place_of_ids(variant: str) -> None:
    model, (ids, mask) = tiny_model(variant), padded_left()
    embeddings = model.get_input_embeddings()(ids)
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model(inputs_embeds=embeddings, attention_mask=mask).logits, expected)
    for both_or_none in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            model(**both_or_none)


@variants
@torch.no_grad()
def test_logits_are_computed_of_the_tokens_that_are_asked_for(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(2, 20)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 7])).logits, logits[:, [0, 7]])


@torch.no_grad()
def test_tuples_and_the_cache_are_given_on_request() -> None:
    model, ids = tiny_model(), random_ids(2, 20)
    logits, cache = model(ids, return_dict=False)
    assert torch.equal(logits, model(ids).logits) and cache.get_seq_length() == 20
    assert model(ids, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(ids).past_key_values is None
