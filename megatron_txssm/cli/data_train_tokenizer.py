"""`txssm data train-tokenizer`: a SentencePiece model from the sources of a corpus recipe."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.corpus_recipe import CorpusRecipe, SubsetSource, load_corpus_recipe

DEFAULT_BYTES = 100_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a corpus recipe: a name in recipes/corpora/, or a YAML file")
    parser.add_argument("--output", required=True, metavar="X.model", help="the model to write")
    parser.add_argument("--vocab-size", type=int, default=32_768, metavar="N", help="pieces (default: %(default)s)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: %(default)s")
    parser.add_argument(
        "--bytes", type=float, default=DEFAULT_BYTES, metavar="B", help="of text, from all subsets (default: 1e8)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="change a field")


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece

    output = Path(args.output).expanduser()
    if output.suffix != ".model":
        raise UserError(f"--output {output} must end in .model")
    if args.bytes < 1:
        raise UserError(f"--bytes {args.bytes:g} must be at least 1")
    recipe = load_corpus_recipe(args.recipe, args.overrides)
    output.parent.mkdir(parents=True, exist_ok=True)
    texts = [text for name in recipe.subsets for text in _texts(recipe, name, args.bytes / len(recipe.subsets))]
    print(
        f"training on {len(texts):,} documents, {sum(len(text.encode()) for text in texts) / 1e6:,.1f} MB", flush=True
    )
    path = train_sentencepiece(texts, output.with_suffix(""), args.vocab_size, model_type=args.model_type)
    print(
        f"{path}: {args.vocab_size:,} pieces; name it as tokenizer.model, with tokenizer.type: SentencePieceTokenizer"
    )
    return 0


def _texts(recipe: CorpusRecipe, name: str, wanted_bytes: float) -> Iterator[str]:
    """The first texts of a subset's files in turn, the same share of each file, up to `wanted_bytes`."""
    from megatron_txssm.data.sharding.plan import list_files

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
    from megatron_txssm.data.corpus.manifest import Slice, is_held_out
    from megatron_txssm.data.sharding.broken_rows import BrokenRows
    from megatron_txssm.data.sharding.fetch import with_texts
    from megatron_txssm.data.sharding.readers import RowReader

    broken = BrokenRows(name, max_broken_fraction=1.0, max_broken_files=subset.max_broken_files)
    documents = with_texts(RowReader(subset, (Slice(file, 0, 1, 0),), broken))
    # What is held out must stay unknown.
    yield from (d.text for d in documents if not is_held_out(d.text, subset.validation_fraction))
