"""Token files for checks."""

from pathlib import Path

# Odd, so that the embedding has padding rows wherever a recipe's may have them.
VOCAB_SIZE = 61


def write_tokens(prefix: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A .bin/.idx pair of 800 documents of 1 to 60 tokens, each a learnable sequence; a sample holds several.

    Each ends with the vocabulary's last id, the end-of-document token of Megatron's NullTokenizer.
    """
    import numpy as np

    from megatron_txssm.data.corpus.shard import write_shard

    random, end = np.random.default_rng(0), vocab_size - 1

    def document() -> list[int]:
        length = int(random.integers(0, 60))
        return ((random.integers(0, 8, length).cumsum() + random.integers(0, end)) % end).tolist()

    write_shard([document() for _ in range(800)], prefix, vocab_size, eod=end)
    return prefix
