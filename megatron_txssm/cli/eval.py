"""txssm eval <command>: how good a trained model is."""

import argparse
import importlib

from megatron_txssm.cli.parsing import Subparsers, add_commands

# Command -> (module with add_arguments and run, one line of help, examples).
COMMANDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "loss": (
        "megatron_txssm.cli.eval_loss",
        "compute the loss of a run's checkpoint on all validation data",
        (
            "txssm eval loss runs/demo",
            "txssm eval loss runs/demo --step 100",
            "txssm eval loss runs/demo --set parallel.tensor_model_parallel_size=1",
            "srun txssm eval loss runs/transxssm_1.3b",
        ),
    ),
    "length": (
        "megatron_txssm.cli.eval_length",
        "compute the loss by position in samples longer than the training's, with each remedy of length extension",
        ("txssm eval length runs/demo", "txssm eval length runs/transxssm_1.3b --seq-length 32768 --parts 32"),
    ),
    "states": (
        "megatron_txssm.cli.eval_states",
        "measure the norms of the state-space layers' recurrent states over position, of one or several checkpoints",
        (
            "txssm eval states runs/demo",
            "txssm eval states runs/transxssm_320m runs/mamba2_320m --length 16384 --output states",
        ),
    ),
    "needle": (
        "megatron_txssm.cli.eval_needle",
        "ask models for a number hidden in a long text, by the text's length and the number's place; heat maps",
        (
            "txssm eval needle runs/transxssm_1.3b runs/llama3_1.3b --lengths 1024 2048 4096 --output needle",
            "txssm eval needle exports/mine --lengths 8192 --depths 11 --samples 20 --text book.txt --output needle",
        ),
    ),
    "mqar": (
        "megatron_txssm.cli.study",
        "train four architectures to recall keys' values, and compare them: the same as `txssm study mqar`",
        ("txssm eval mqar --parallel 2", "txssm eval mqar --table"),
    ),
    "harness": (
        "megatron_txssm.cli.eval_harness",
        "score a checkpoint or a Hugging Face folder on the tasks of EleutherAI's harness (MMLU, LAMBADA, ...)",
        (
            "txssm eval harness runs/transxssm_320m --data data/benchmarks",
            "txssm eval harness exports/transxssm_320m --data data/benchmarks",
            "txssm eval harness runs/demo --tasks lambada_openai piqa --limit 100",
            "txssm eval harness runs/demo --tasks my_task.yaml --num-fewshot 3",
            "txssm eval harness runs/transxssm_1.3b --data data/benchmarks --submit --nodes 1 --gpus-per-node 8",
            "srun txssm eval harness runs/transxssm_1.3b --data data/benchmarks --batch-size 32",
        ),
    ),
    "fetch": (
        "megatron_txssm.cli.eval_fetch",
        "download the data of tasks into a folder, for nodes that do not reach the hub",
        ("txssm eval fetch data/benchmarks", "txssm eval fetch data/benchmarks --tasks lambada_openai piqa"),
    ),
}


def add_parser(subparsers: Subparsers) -> None:
    about = {name: (summary, examples) for name, (_, summary, examples) in COMMANDS.items()}
    for name, command in add_commands(subparsers, "eval", about).items():
        importlib.import_module(COMMANDS[name][0]).add_arguments(command)


def run(args: argparse.Namespace) -> int | None:
    return importlib.import_module(COMMANDS[args.command][0]).run(args)
