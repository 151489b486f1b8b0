"""`txssm data train-tokenizer`: train a SentencePiece model on the sources of a corpus recipe."""

import argparse

from megatron_txssm.cli.parsing import add_set_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a corpus recipe: a name in recipes/corpora/, or a YAML file")
    parser.add_argument("--output", required=True, metavar="X.model", help="the model to write")
    parser.add_argument(
        "--vocab-size", type=int, default=32_768, metavar="N", help="number of pieces (default: %(default)s)"
    )
    parser.add_argument(
        "--model-type", choices=("bpe", "unigram"), default="bpe", help="kind of model (default: %(default)s)"
    )
    parser.add_argument(
        "--bytes",
        type=float,
        default=1e8,
        metavar="B",
        help="bytes of text to train on, from all subsets together (default: 1e8)",
    )
    add_set_option(parser)


def run(args: argparse.Namespace) -> int:
    from megatron_txssm.data.sharding.train_tokenizer import train_tokenizer

    options = {"vocab_size": args.vocab_size, "model_type": args.model_type, "text_bytes": args.bytes}
    return train_tokenizer(args.recipe, args.output, overrides=args.overrides, **options)
