"""Unigram and interpolated bigram models: baselines that a model must beat to have learned more than counts.

Losses are cross-entropies in nats per token over the stream of documents joined by end-of-document tokens, which
Megatron's GPTDataset cuts into samples. As there, every token but the first is predicted once, so a model evaluated
over one whole epoch of the same shard sees the same tokens, except for an incomplete last sample that Megatron drops.
Megatron's shuffling of the documents has no effect: each begins after the same token.

Smoothing is Jelinek-Mercer interpolation with weights fitted by expectation-maximisation on held-out training text
(Jelinek and Mercer 1980, "Interpolated estimation of Markov source parameters from sparse data"), for the bigram with
one set of weights per range of context counts (Chen and Goodman 1999, "An empirical study of smoothing techniques for
language modeling", section 2.3). The weights never see the validation split.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# V=vocabulary  N=predicted tokens  K=interpolated models  U=distinct bigrams

# The stream is cut into this many equal blocks, and every tenth is held out to fit the weights: each has many
# documents, and they cover the whole corpus.
HELD_OUT_BLOCKS = 100
HELD_OUT_EVERY = 10

EM_MAX_ITERATIONS = 200
# Stop when no weight changes by more than this.
EM_TOLERANCE = 1e-6
# The overall weights are a prior for each range of context counts, worth this many observations.
BUCKET_PRIOR_TOKENS = 10.0


def unigram_loss(train_tokens: "np.ndarray", validation_tokens: "np.ndarray", vocab_size: int) -> float:
    """Validation cross-entropy, nats per token, of the unigram model interpolated with the uniform distribution.

    train_tokens, validation_tokens: [tokens] integer streams with ids in [0, vocab_size).
    """
    import numpy as np

    train = _as_stream(train_tokens, vocab_size, "train_tokens")
    validation = _as_stream(validation_tokens, vocab_size, "validation_tokens")
    targets, held_out = train[1:], _held_out_mask(train.size - 1)
    uniform = 1.0 / vocab_size

    def probabilities(counted: "np.ndarray", predicted: "np.ndarray") -> "np.ndarray":
        frequencies_V = np.bincount(counted, minlength=vocab_size) / counted.size
        return np.stack([frequencies_V[predicted], np.full(predicted.size, uniform)], axis=1)

    weights = _fit_weights(probabilities(targets[~held_out], targets[held_out]))
    return float(-np.log(probabilities(targets, validation[1:]) @ weights).mean())


def bigram_loss(train_tokens: "np.ndarray", validation_tokens: "np.ndarray", vocab_size: int) -> float:
    """Validation cross-entropy, nats per token, of the bigram interpolated with the unigram and the uniform model.

    train_tokens, validation_tokens: [tokens] integer streams with ids in [0, vocab_size).
    """
    import numpy as np

    train = _as_stream(train_tokens, vocab_size, "train_tokens")
    validation = _as_stream(validation_tokens, vocab_size, "validation_tokens")
    contexts, targets, held_out = train[:-1], train[1:], _held_out_mask(train.size - 1)

    fitted = _BigramCounts(contexts[~held_out], targets[~held_out], vocab_size)
    held_out_NK, buckets_N = fitted.probabilities(contexts[held_out], targets[held_out])
    overall_K = _fit_weights(held_out_NK)
    weights_BK = np.stack(
        [
            _fit_weights(held_out_NK[buckets_N == bucket], prior=overall_K)
            for bucket in range(fitted.num_buckets(train.size))
        ]
    )

    full = _BigramCounts(contexts, targets, vocab_size)
    validation_NK, buckets_N = full.probabilities(validation[:-1], validation[1:])
    return float(-np.log((validation_NK * weights_BK[buckets_N]).sum(axis=1)).mean())


class _BigramCounts:
    """Sparse counts of (context, target) pairs: V² counts would take 134 MB at a vocabulary of 4,096."""

    def __init__(self, contexts_N: "np.ndarray", targets_N: "np.ndarray", vocab_size: int):
        import numpy as np

        self.vocab_size = vocab_size
        self.context_counts_V = np.bincount(contexts_N, minlength=vocab_size)
        self.frequencies_V = np.bincount(targets_N, minlength=vocab_size) / targets_N.size
        self.codes_U, self.counts_U = np.unique(contexts_N * vocab_size + targets_N, return_counts=True)

    @staticmethod
    def num_buckets(num_tokens: int) -> int:
        """Buckets needed for contexts seen up to `num_tokens` times."""
        return num_tokens.bit_length() + 1

    def probabilities(self, contexts_N: "np.ndarray", targets_N: "np.ndarray") -> tuple["np.ndarray", "np.ndarray"]:
        """Per pair: the probabilities by bigram, unigram and uniform model [N, 3], and the bucket of its context [N].

        After an unseen context the bigram equals the unigram, so that every mixture sums to one.
        """
        import numpy as np

        codes_N = contexts_N * self.vocab_size + targets_N
        positions_N = np.searchsorted(self.codes_U, codes_N).clip(max=self.codes_U.size - 1)
        pair_counts_N = np.where(self.codes_U[positions_N] == codes_N, self.counts_U[positions_N], 0)
        context_counts_N = self.context_counts_V[contexts_N]
        unigram_N = self.frequencies_V[targets_N]
        bigram_N = np.where(context_counts_N > 0, pair_counts_N / np.maximum(context_counts_N, 1), unigram_N)
        uniform_N = np.full(codes_N.size, 1.0 / self.vocab_size)
        # Bucket b holds the counts from 2^(b-1) to 2^b - 1, bucket 0 the unseen contexts: numpy's bit_length.
        buckets_N = np.frexp(context_counts_N.astype(np.float64))[1]
        return np.stack([bigram_N, unigram_N, uniform_N], axis=1), buckets_N


def _fit_weights(probabilities_NK: "np.ndarray", prior: "np.ndarray | None" = None) -> "np.ndarray":
    """Maximum-likelihood mixture weights [K] of the observed tokens, by expectation-maximisation.

    prior: weights towards which a bucket with few observations is pulled; without it, EM starts from equal weights.
    """
    import numpy as np

    num_models = probabilities_NK.shape[1]
    start_K = np.full(num_models, 1.0 / num_models)
    pull_K = np.zeros(num_models) if prior is None else BUCKET_PRIOR_TOKENS * prior
    # Many tokens share a row (frequent pairs): each distinct row once, with its count.
    rows_UK, counts_U = np.unique(probabilities_NK, axis=0, return_counts=True)
    weights_K = start_K if prior is None else prior
    for _ in range(EM_MAX_ITERATIONS):
        joint_UK = rows_UK * weights_K
        responsibility_K = (joint_UK * (counts_U / joint_UK.sum(axis=1))[:, None]).sum(axis=0) + pull_K
        updated_K = responsibility_K / responsibility_K.sum()
        moved = np.abs(updated_K - weights_K).max()
        weights_K = updated_K
        if moved < EM_TOLERANCE:
            break
    return weights_K


def _held_out_mask(num_predictions: int) -> "np.ndarray":
    """Which predictions [N] are held out to fit the interpolation weights."""
    import numpy as np

    block_N = np.arange(num_predictions) * HELD_OUT_BLOCKS // num_predictions
    return block_N % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _as_stream(tokens: "np.ndarray", vocab_size: int, name: str) -> "np.ndarray":
    """The tokens as int64 [tokens], after checks of their range and number."""
    import numpy as np

    stream = np.asarray(tokens).astype(np.int64).reshape(-1)
    minimum = HELD_OUT_BLOCKS + 1 if name == "train_tokens" else 2
    if stream.size < minimum:
        raise ValueError(f"{name} holds {stream.size} tokens, at least {minimum} are needed")
    if stream.min() < 0 or stream.max() >= vocab_size:
        raise ValueError(f"{name} holds ids from {stream.min()} to {stream.max()}, outside vocab_size={vocab_size}")
    return stream
