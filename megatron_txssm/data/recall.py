"""Samples of multi-query associative recall, MQAR (arXiv:2312.04927): keys with their values, then keys alone.

L=sequence length
"""

from typing import NamedTuple

import numpy as np

# Exponent of the power law of a query's distance from the pairs, p(i) ~ i ** (POWER - 1), as in arXiv:2312.04927.
POWER = 0.01
# Held-out samples of each number of pairs.
VALIDATION_SAMPLES = 100


class RecallSample(NamedTuple):
    """int64 [L] each. A label is a value where the token asks for a key's, elsewhere 0, where `is_query` is 0, too."""

    tokens: np.ndarray
    labels: np.ndarray
    is_query: np.ndarray


def recall_sample(draw: np.random.Generator, pairs: int, seq_length: int, vocab_size: int) -> RecallSample:
    """A sample of `pairs` different keys and values, in which each key is asked for once.

    The pairs come first. Each query stands at an even distance from them, and what follows it is not the answer: all
    tokens that are neither pairs nor queries are drawn from the whole vocabulary. The recipe's validation ensures that
    there is room for them: two tokens for each pair, two for each query.
    """
    half = vocab_size // 2
    keys = 1 + draw.choice(half - 1, pairs, replace=False)
    values = half + draw.choice(vocab_size - half, pairs, replace=False)
    tokens = draw.integers(vocab_size, size=seq_length)
    tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    places = np.arange(1, (seq_length - 2 * pairs) // 2 + 1)
    likelihood = places ** (POWER - 1.0)
    queries = 2 * (pairs - 1 + draw.choice(places, pairs, replace=False, p=likelihood / likelihood.sum()))
    tokens[queries] = keys
    labels, is_query = np.zeros_like(tokens), np.zeros_like(tokens)
    labels[queries], is_query[queries] = values, 1
    return RecallSample(tokens, labels, is_query)
