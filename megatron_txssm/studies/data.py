"""The data of a study: a corpus of the user's, or the demo's."""

from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.data.corpus.manifest import corpus_directory
from megatron_txssm.demo.corpus import prepare_demo_corpus
from megatron_txssm.recipe.loader import load_recipe

# Their sizes: for CPUs, or the paper's.
PRESETS = ("small", "paper")


def corpus_overrides(preset: str, corpus: str | None, overrides: Sequence[str]) -> list[str]:
    """Overrides that name the corpus of a study, which is made for "small" if it is not there.

    corpus: directory or recipe of the user's; None: the standard library of this Python (10 MB) for "small", the
    recipes' own for "paper". overrides: the user's.
    """
    if corpus is not None:
        directory = corpus_directory(corpus)
    elif preset == "small":
        data = load_recipe("position_encoding_small", overrides).data
        directory = prepare_demo_corpus(Path(data.corpus or "").parent, vocab_size=data.vocab_size).directory
    else:
        return []
    # The corpus's tokenizer decides the vocabulary.
    return [f"data.corpus={directory}", "data.weights=null", "data.vocab_size=null"]
