"""Trains a SentencePiece model on the sources of a corpus recipe, without the documents held out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_txssm.data.corpus.manifest import Slice, is_held_out
from megatron_txssm.data.sharding.broken_rows import BrokenRows
from megatron_txssm.data.sharding.fetch import with_texts
from megatron_txssm.data.sharding.plan import list_files
from megatron_txssm.data.sharding.readers import RowReader
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from megatron_txssm.recipe.corpus.schema import CorpusRecipe, SubsetSource


def train_tokenizer(
    recipe: str | Path,
    output: str | Path,
    *,
    vocab_size: int = 32_768,
    model_type: Literal["bpe", "unigram"] = "bpe",
    text_bytes: float = 1e8,
    overrides: Sequence[str] = (),
) -> int:
    """Train a tokenizer of `vocab_size` pieces on a corpus recipe's sources; returns the exit code.

    output: the file to write, X.model. text_bytes: UTF-8 bytes to train on, the same share from each subset.
    overrides: recipe fields to change, as "a.b=c". UserError if a source cannot be read.
    """
    model = Path(output).expanduser()
    if model.suffix != ".model":
        raise UserError(f"--output {model} must end in .model")
    if text_bytes < 1:
        raise UserError(f"--bytes {text_bytes:g} must be at least 1")
    corpus = load_corpus_recipe(recipe, overrides)
    model.parent.mkdir(parents=True, exist_ok=True)
    texts = [text for name in corpus.subsets for text in _texts(corpus, name, text_bytes / len(corpus.subsets))]
    print(
        f"training on {len(texts):,} documents, {sum(len(text.encode()) for text in texts) / 1e6:,.1f} MB", flush=True
    )
    path = train_sentencepiece(texts, model.with_suffix(""), vocab_size, model_type=model_type)
    print(f"{path}: {vocab_size:,} pieces; name it as tokenizer.model, with tokenizer.type: SentencePieceTokenizer")
    return 0


def _texts(recipe: CorpusRecipe, name: str, wanted_bytes: float) -> Iterator[str]:
    """The first texts of each of a subset's files, the same share from each, `wanted_bytes` in all."""
    subset = recipe.subsets[name]
    files = list_files(name, subset)
    for file, _ in files:
        left = wanted_bytes / len(files)
        for text in _file_texts(name, subset, file):
            if left <= 0:
                break
            left -= len(text.encode())
            yield text


def _file_texts(name: str, subset: SubsetSource, file: str) -> Iterator[str]:
    broken = BrokenRows(name, max_broken_fraction=1.0, max_broken_files=subset.max_broken_files)
    documents = with_texts(RowReader(subset, (Slice(file, 0, 1, 0),), broken))
    # The tokenizer must not see the documents held out.
    yield from (d.text for d in documents if not is_held_out(d.text, subset.validation_fraction))
