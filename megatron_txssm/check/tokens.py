"""Token files to check with."""

from pathlib import Path

# Odd, so that the embedding has rows of padding wherever a recipe's may have.
VOCAB_SIZE = 61


def write_tokens(prefix: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A .bin/.idx pair of 800 documents of 1 to 60 tokens, each a learnable sequence: several in a sample.

    Each ends with the vocabulary's last id, which Megatron's NullTokenizer takes for the end of a document.
    """
    import numpy as np

    from megatron_txssm.data.corpus.shard import write_shard

    random, end = np.random.default_rng(0), vocab_size - 1

    def document() -> list[int]:
        length = int(random.integers(0, 60))
        return ((random.integers(0, 8, length).cumsum() + random.integers(0, end)) % end).tolist()

    write_shard([document() for _ in range(800)], prefix, vocab_size, eod=end)
    return prefix
