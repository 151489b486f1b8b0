"""The n-gram baselines against plain dictionaries, and against sources whose entropy is known."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron_txssm.demo import ngram
from megatron_txssm.demo.ngram import bigram_loss, unigram_loss


def _markov_stream(transition: np.ndarray, length: int, seed: int) -> np.ndarray:
    """A sample of the Markov chain: inverse-CDF steps over one vector of uniform numbers."""
    uniform = np.random.default_rng(seed).random(length)
    cumulative = transition.cumsum(axis=1)
    stream = np.zeros(length, dtype=np.int64)
    for index in range(1, length):
        stream[index] = np.searchsorted(cumulative[stream[index - 1]], uniform[index])
    return stream.clip(max=len(transition) - 1)


def _stationary(transition: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eig(transition.T)
    vector = np.real(vectors[:, np.argmin(abs(values - 1))])
    return vector / vector.sum()


def test_a_markov_chain_has_its_entropies():
    states = 12
    transition = np.random.default_rng(0).dirichlet(np.full(states, 0.3), size=states)
    stationary = _stationary(transition)
    stationary_entropy = -(stationary * np.log(stationary)).sum()
    entropy_rate = -(stationary[:, None] * transition * np.log(np.maximum(transition, 1e-300))).sum()
    train, validation = _markov_stream(transition, 300_000, 1), _markov_stream(transition, 100_000, 2)
    assert stationary_entropy - entropy_rate > 0.5
    # Sampling error of a mean over 100,000 tokens: about 0.005 nats.
    assert unigram_loss(train, validation, states) == pytest.approx(stationary_entropy, abs=0.02)
    assert bigram_loss(train, validation, states) == pytest.approx(entropy_rate, abs=0.02)


def test_uniform_tokens_cost_the_logarithm_of_the_vocabulary():
    vocab_size = 50
    train, validation = np.random.default_rng(3).integers(0, vocab_size, size=(2, 100_000))
    assert unigram_loss(train, validation, vocab_size) == pytest.approx(math.log(vocab_size), abs=0.002)
    assert bigram_loss(train, validation, vocab_size) == pytest.approx(math.log(vocab_size), abs=0.005)


def _em_with_lists(rows, prior=None):
    """Expectation-maximisation one token at a time."""
    weights = list(prior) if prior is not None else [1 / len(rows[0])] * len(rows[0])
    size = len(weights)
    for _ in range(ngram.EM_MAX_ITERATIONS):
        sums = [ngram.BUCKET_PRIOR_TOKENS * weight for weight in prior] if prior is not None else [0.0] * size
        for row in rows:
            total = sum(weight * p for weight, p in zip(weights, row, strict=True))
            for k in range(size):
                sums[k] += weights[k] * row[k] / total
        updated = [value / sum(sums) for value in sums]
        moved = max(abs(new - old) for new, old in zip(updated, weights, strict=True))
        weights = updated
        if moved < ngram.EM_TOLERANCE:
            break
    return weights


def _brute_force_losses(train, validation, vocab_size):
    """(unigram, bigram) losses with dictionaries and loops."""
    pairs = list(pairwise(train))
    is_held_out = [
        (index * ngram.HELD_OUT_BLOCKS // len(pairs)) % ngram.HELD_OUT_EVERY == ngram.HELD_OUT_EVERY - 1
        for index in range(len(pairs))
    ]
    held_out = [pair for pair, held in zip(pairs, is_held_out, strict=True) if held]
    fitted = [pair for pair, held in zip(pairs, is_held_out, strict=True) if not held]

    def row(counted):
        pair_counts, contexts = Counter(counted), Counter(context for context, _ in counted)
        targets = Counter(target for _, target in counted)

        def probabilities(pair):
            unigram = targets[pair[1]] / len(counted)
            seen = contexts[pair[0]]
            bigram = pair_counts[pair] / seen if seen else unigram
            return [bigram, unigram, 1 / vocab_size], seen.bit_length()

        return probabilities

    of_fitted, of_all = row(fitted), row(pairs)
    unigram_weights = _em_with_lists([of_fitted(pair)[0][1:] for pair in held_out])
    overall = _em_with_lists([of_fitted(pair)[0] for pair in held_out])
    buckets = {
        bucket: _em_with_lists([of_fitted(pair)[0] for pair in held_out if of_fitted(pair)[1] == bucket], overall)
        for bucket in range(20)
    }
    unigram, bigram = [], []
    for pair in pairwise(validation):
        probabilities, bucket = of_all(pair)
        unigram.append(sum(w * p for w, p in zip(unigram_weights, probabilities[1:], strict=True)))
        bigram.append(sum(w * p for w, p in zip(buckets[bucket], probabilities, strict=True)))
    return tuple(-sum(map(math.log, values)) / len(values) for values in (unigram, bigram))


@pytest.mark.parametrize("vocab_size", [7, 300])
def test_agrees_with_dictionaries(vocab_size):
    # Zipf's law: many rare tokens; contexts seen never, once, and often.
    generator = np.random.default_rng(vocab_size)
    train, validation = (generator.zipf(1.3, size=size) % vocab_size for size in (1500, 700))
    expected = _brute_force_losses(train.tolist(), validation.tolist(), vocab_size)
    assert unigram_loss(train, validation, vocab_size) == pytest.approx(expected[0], rel=1e-9)
    assert bigram_loss(train, validation, vocab_size) == pytest.approx(expected[1], rel=1e-9)


def test_the_bigram_distribution_sums_to_one():
    vocab_size = 40
    # Three tokens never occur, so their contexts have no bigrams.
    train = np.random.default_rng(5).zipf(1.3, size=400) % (vocab_size - 3)
    counts = ngram._BigramCounts(train[:-1], train[1:], vocab_size)
    contexts, targets = (grid.ravel() for grid in np.meshgrid(np.arange(vocab_size), np.arange(vocab_size)))
    probabilities, buckets = counts.probabilities(contexts, targets)
    assert (buckets == 0).any()
    for context in range(vocab_size):
        assert probabilities[contexts == context].sum(axis=0) == pytest.approx([1.0, 1.0, 1.0])


def test_narrow_token_types_do_not_overflow():
    train, validation = np.random.default_rng(6).integers(0, 4000, size=(2, 5000))
    for loss in (unigram_loss, bigram_loss):
        narrow = loss(train.astype(np.uint16), validation.astype(np.uint16), 4000)
        assert narrow == loss(train, validation, 4000)


def test_wrong_streams_are_refused():
    with pytest.raises(ValueError, match="outside vocab_size=10"):
        unigram_loss(np.full(1000, 10), np.zeros(10, int), 10)
    with pytest.raises(ValueError, match="train_tokens holds 5 tokens"):
        bigram_loss(np.zeros(5, int), np.zeros(10, int), 10)
