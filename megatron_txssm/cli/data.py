"""txssm data <command>: make, check and inspect a corpus of Megatron shards."""

import argparse
import importlib

from megatron_txssm.cli.parsing import Subparsers, add_commands

# Command -> (module with add_arguments_ and run_ functions of that name, one line of help, examples).
COMMANDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "shard": (
        "megatron_txssm.cli.data_shard",
        "tokenise a corpus into .bin/.idx shards; run it again to resume",
        (
            "txssm data shard smollm_corpus --plan",
            "txssm data shard smollm_corpus --workers 16",
            "txssm data shard smollm_corpus --slurm --set slurm.partition=cpu",
            "txssm data shard smollm_corpus --set output=data/trial --set subsets.cosmopedia-v2.limit=1000",
        ),
    ),
    "status": (
        "megatron_txssm.cli.data_status",
        "show the progress of a corpus, wherever its tasks run",
        ("txssm data status data/smollm-corpus", "txssm data status data/smollm-corpus --follow"),
    ),
    "verify": (
        "megatron_txssm.cli.data_verify",
        "check every shard against its manifest and with Megatron's own reader; list the tasks to redo",
        ("txssm data verify data/smollm-corpus", "txssm data verify data/smollm-corpus --redo"),
    ),
    "combine": (
        "megatron_txssm.cli.data_combine",
        "combine several finished corpora into one; their shards are linked, not copied",
        (
            "txssm data combine data/all data/smollm-corpus data/mine",
            "txssm data combine data/all data/smollm-corpus data/mine=mine",
        ),
    ),
    "blend": (
        "megatron_txssm.cli.data_blend",
        "show how many tokens and epochs a training draws from each subset",
        (
            "txssm data blend transxssm_320m",
            "txssm data blend transxssm_320m --set 'data.weights={fineweb-edu-dedup: 0.8, python-edu: 0.2}'",
            "txssm data blend data/smollm-corpus --tokens 100e9 --megatron-args",
        ),
    ),
    "trace": (
        "megatron_txssm.cli.data_trace",
        "show the documents of a training step, their sources and their text",
        (
            "txssm data trace transxssm_320m --step 3125 --nproc 16",
            "txssm data trace transxssm_320m --step 3125 --nproc 16 --sample 17",
        ),
    ),
    "train-tokenizer": (
        "megatron_txssm.cli.data_train_tokenizer",
        "train a SentencePiece tokenizer on a corpus's sources",
        ("txssm data train-tokenizer smollm_corpus --vocab-size 32768 --output tokenizer.model",),
    ),
}


def add_parser(subparsers: Subparsers) -> None:
    about = {name: (summary, examples) for name, (_, summary, examples) in COMMANDS.items()}
    for name, command in add_commands(subparsers, "data", about).items():
        importlib.import_module(COMMANDS[name][0]).add_arguments(command)


def run(args: argparse.Namespace) -> int | None:
    return importlib.import_module(COMMANDS[args.command][0]).run(args)
