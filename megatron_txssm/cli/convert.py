"""txssm convert export, import, verify: weights between Megatron checkpoints and Hugging Face folders."""

import argparse
from pathlib import Path

from megatron_txssm.checkpoint.tensors import DTYPES
from megatron_txssm.cli.parsing import Subparsers, add_commands
from megatron_txssm.convert.export import export
from megatron_txssm.convert.formats.format import FORMATS
from megatron_txssm.convert.importer import import_weights
from megatron_txssm.convert.verify import verify

# Command -> (one line of help, examples).
COMMANDS = {
    "export": (
        "write the weights of a checkpoint, saved in any parallel layout, as a Hugging Face model; needs no GPU",
        (
            "txssm convert export runs/demo exports/demo",
            "txssm convert export runs/transxssm_1.3b exports/transxssm_1.3b --dtype bf16 --max-file-gb 5",
            "txssm convert export megatron_lm/checkpoints exports/mine --recipe transxssm_1.3b",
            "txssm convert export runs/jamba_320m exports/jamba --step 20000 --layout granitemoehybrid",
        ),
    ),
    "import": (
        "convert a Hugging Face model to a Megatron checkpoint, to continue training from",
        (
            "txssm convert import exports/demo imported/demo",
            "txssm convert import downloads/some-llama imported/llama",
            "txssm convert import downloads/some-llama imported/llama --recipe my_llama.yaml",
            "txssm convert import downloads/some-llama imported/hybrid --as transxssm",
        ),
    ),
    "verify": (
        "compare two models, each a checkpoint or a folder of weights; exit code 1 if they differ",
        (
            "txssm convert verify runs/demo exports/demo",
            "txssm convert verify exports/demo imported/demo",
        ),
    ),
}


def add_parser(subparsers: Subparsers) -> None:
    add = {"export": _add_export, "import": _add_import, "verify": _add_verify}
    for name, command in add_commands(subparsers, "convert", COMMANDS).items():
        add[name](command)


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's folder, or its checkpoints")
    command.add_argument("out", metavar="OUT", type=Path, help="the folder to create")
    command.add_argument(
        "--layout",
        choices=FORMATS,
        help="format of names and classes, see docs/convert.md (default: llama if it fits, otherwise transxssm)",
    )
    command.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="dtype of the weights (default: as saved); bf16 keeps A_log, dt_bias and D in fp32, as in training",
    )
    command.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    command.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="recipe of the checkpoint (default: recipe.yaml beside it; stock Megatron-LM writes none)",
    )
    command.add_argument(
        "--max-file-gb", type=float, default=2.0, metavar="GB", help="largest file, in 1e9 bytes (default: 2)"
    )
    command.add_argument("--no-verify", action="store_true", help="skip the proof (verification.json)")


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="HF", type=Path, help="a folder with model.safetensors, or several of them")
    command.add_argument("out", metavar="OUT", type=Path, help="the checkpoints folder to create")
    command.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="recipe of the model and its training (default: the folder's recipe.yaml, otherwise its config.json)",
    )
    command.add_argument(
        "--as",
        dest="as_architecture",
        choices=("transxssm",),
        help="begin a TransXSSM from a Transformer's weights: seven of eight attention layers become state-space ones",
    )
    command.add_argument("--no-verify", action="store_true", help="skip the proof (verification.json)")


def _add_verify(command: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        command.add_argument(
            name, metavar=name.upper(), type=Path, help="a run, its checkpoints, or a Hugging Face folder"
        )
    command.add_argument("--step", type=int, metavar="N", help="step of A's checkpoint (default: the newest)")
    command.add_argument("--step-b", type=int, metavar="N", help="step of B's checkpoint (default: the newest)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the proof to this file")


def run(args: argparse.Namespace) -> int:
    if args.command == "verify":
        return verify(args.a, args.b, step=args.step, step_b=args.step_b, proof_file=args.json)
    common = {"recipe": args.recipe, "verify": not args.no_verify}
    if args.command == "import":
        return import_weights(args.folder, args.out, as_transxssm=args.as_architecture == "transxssm", **common)
    options = {"format": args.layout, "dtype": args.dtype, "step": args.step, "max_file_gb": args.max_file_gb}
    return export(args.checkpoint, args.out, **options, **common)
