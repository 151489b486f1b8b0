"""Samples of multi-query associative recall."""

import numpy as np
import pytest

from megatron_txssm.data.recall import recall_sample


@pytest.mark.parametrize(("pairs", "seq_length", "vocab_size"), [(4, 64, 64), (16, 64, 34), (1, 5, 9)])
def test_each_key_is_asked_for_once_and_the_label_is_its_value(pairs: int, seq_length: int, vocab_size: int) -> None:
    for seed in range(20):
        tokens, labels, is_query = recall_sample(np.random.default_rng(seed), pairs, seq_length, vocab_size)
        value_of = dict(zip(tokens[0 : 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(value_of) == len(set(value_of.values())) == pairs
        assert all(1 <= key < vocab_size // 2 <= value < vocab_size for key, value in value_of.items())
        queries = np.flatnonzero(is_query)
        assert min(queries) >= 2 * pairs and not (queries % 2).any()
        assert {int(tokens[place]): int(labels[place]) for place in queries} == value_of
        assert len(tokens) == seq_length and not labels[is_query == 0].any()


def test_queries_are_near_the_pairs_by_a_power_law() -> None:
    """With one pair, the nearest place is taken as often as the law says, 1 / sum of i ** -0.99."""
    draw = np.random.default_rng(0)
    places = [int(recall_sample(draw, 1, 66, 16).is_query.argmax()) for _ in range(4000)]
    expected = 1 / sum(place**-0.99 for place in range(1, 33))
    assert np.mean([place == 2 for place in places]) == pytest.approx(expected, abs=0.03)
    assert max(places) > 32


def test_the_token_after_a_query_does_not_tell_its_answer() -> None:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(200):
        tokens, labels, is_query = recall_sample(draw, 4, 32, 64)
        queries = np.flatnonzero(is_query)
        found += (tokens[queries + 1] == labels[queries]).tolist()
    assert np.mean(found) < 0.1
