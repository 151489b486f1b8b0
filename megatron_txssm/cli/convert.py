"""txssm convert export, import, verify: weights from Megatron's checkpoints to Hugging Face's folders and back."""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.checkpoint.tensors import DTYPES
from megatron_txssm.cli.parsing import add_commands
from megatron_txssm.convert.formats import LAYOUTS, choose_layout
from megatron_txssm.convert.importer import import_weights
from megatron_txssm.convert.proof import NotTheSame
from megatron_txssm.convert.worker import TaskFailed
from megatron_txssm.errors import UserError, readable
from megatron_txssm.files import check_absent, complete_folder
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.slurm.environment import adopt_slurm_step
from megatron_txssm.terminal import progress_bar

# Command -> (one line of help, examples).
COMMANDS = {
    "export": (
        "write a checkpoint's weights as a Hugging Face model, whatever layout it was saved at; no GPU needed",
        (
            "txssm convert export runs/demo exports/demo",
            "txssm convert export runs/transxssm_1.3b exports/transxssm_1.3b --dtype bf16 --max-file-gb 5",
            "txssm convert export megatron_lm/checkpoints exports/mine --recipe transxssm_1.3b",
            "txssm convert export runs/jamba_320m exports/jamba --step 20000 --layout granitemoehybrid",
        ),
    ),
    "import": (
        "make a Megatron checkpoint of a Hugging Face model, to train on from",
        (
            "txssm convert import exports/demo imported/demo",
            "txssm convert import downloads/some-llama imported/llama",
            "txssm convert import downloads/some-llama imported/llama --recipe my_llama.yaml",
        ),
    ),
    "verify": (
        "compare two models, each a checkpoint or a folder of weights; exit code 1 where they differ",
        (
            "txssm convert verify runs/demo exports/demo",
            "txssm convert verify exports/demo imported/demo",
        ),
    ),
}


def add_parser(subparsers: Any) -> None:
    add = {"export": _add_export, "import": _add_import, "verify": _add_verify}
    for name, command in add_commands(subparsers, "convert", COMMANDS).items():
        add[name](command)


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's folder, or its checkpoints")
    command.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    command.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="whose names and classes, see docs/convert.md (default: llama where it fits, otherwise transxssm)",
    )
    command.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the weights (default: as saved); bf16 leaves A_log, dt_bias and D in fp32, as training does",
    )
    command.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    command.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="that trained them (default: recipe.yaml beside the checkpoints; stock Megatron-LM writes none)",
    )
    command.add_argument(
        "--max-file-gb", type=float, default=2.0, metavar="GB", help="largest file, in 1e9 bytes (default: 2)"
    )
    command.add_argument("--no-verify", action="store_true", help="leave out the proof (verification.json)")


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="HF", type=Path, help="a folder with model.safetensors, or several of them")
    command.add_argument("out", metavar="OUT", type=Path, help="the checkpoints folder to make")
    command.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="describes the model and its training (default: recipe.yaml in the folder, or else its config.json)",
    )
    command.add_argument("--no-verify", action="store_true", help="leave out the proof (verification.json)")


def _add_verify(command: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        command.add_argument(
            name, metavar=name.upper(), type=Path, help="a run, its checkpoints, or a Hugging Face folder"
        )
    command.add_argument("--step", type=int, metavar="N", help="which checkpoint of A (default: the newest)")
    command.add_argument("--step-b", type=int, metavar="N", help="which checkpoint of B (default: the newest)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the proof to a file, too")


def run(args: argparse.Namespace) -> int:
    adopt_slurm_step()
    # Of several tasks of a Slurm step, one is enough.
    if os.environ.get("RANK", "0") != "0":
        return 0
    commands = {"export": export, "import": import_weights, "verify": verify}
    # What a killed job leaves is removed, as at Ctrl-C.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return commands[args.command](args)
    except NotTheSame as error:
        print(
            f"error: the conversion does not give the same model, and nothing was written:\n{error}\nTo look at it: "
            "convert with --no-verify, then `txssm convert verify`",
            file=sys.stderr,
        )
        return 1
    except TaskFailed as error:
        print(readable(f"error: {error}"), file=sys.stderr)
        return 3
    finally:
        signal.signal(signal.SIGTERM, previous)


def export(args: argparse.Namespace) -> int:
    if not args.max_file_gb > 0:
        raise UserError(f"--max-file-gb {args.max_file_gb:g} must be above 0")
    check_absent(args.out)
    saved = open_checkpoint(args.checkpoint, args.step, recipe=load_recipe(args.recipe) if args.recipe else None)
    # What follows imports transformers, for which nobody is to wait who mistyped a path.
    from megatron_txssm.convert.export import Export, write_weights
    from megatron_txssm.convert.hf_files import write_configuration, write_model_card, write_tokenizer
    from megatron_txssm.convert.proof import prove_export

    planned = Export(saved, choose_layout(saved.recipe, args.layout), args.dtype)
    with complete_folder(args.out, planned.nbytes) as folder:
        with progress_bar("exporting", planned.nbytes, of_bytes=True) as advance:
            limit = int(args.max_file_gb * 1e9)
            hashes = write_weights(planned, folder, max_file_bytes=limit, advance=advance)
        if args.recipe:
            (folder / "recipe.yaml").write_text(saved.recipe.to_yaml(), encoding="utf-8")
        else:
            shutil.copyfile(saved.checkpoints / "recipe.yaml", folder / "recipe.yaml")
        write_configuration(planned, write_tokenizer(planned, folder), folder)
        proof = None if args.no_verify else prove_export(saved, folder, hashes)
        write_model_card(planned, folder, args.out.name, proof)
        _write_facts(planned, folder)
    what = f"step {saved.step}, layout {planned.layout}, {planned.numel:,} parameters, {planned.nbytes:,} bytes"
    print(f"{args.out}: {what}")
    for line in proof.summary() if proof else ():
        print(line)
    return 0


def _write_facts(planned: Any, folder: Path) -> None:
    """export.json: what was exported, and the hash of every file."""
    recipe = planned.saved.recipe
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {
        "name": recipe.name,
        "step": planned.saved.step,
        "layout": planned.layout,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in planned.tensors.values()}),
        "parameters": planned.numel,
        "vocab_size": recipe.data.vocab_size,
        "padding_rows_removed": recipe.padded_vocab_size - recipe.data.vocab_size,
        "sha256": {str(file.relative_to(folder)): _sha256(file) for file in files},
    }
    (folder / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def verify(args: argparse.Namespace) -> int:
    from megatron_txssm.convert.proof import prove_equal

    if args.json and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder; make it first")
    proof = prove_equal(_open(args.a, args.step, "--step"), _open(args.b, args.step_b, "--step-b"))
    if args.json:
        args.json.write_text(json.dumps(proof.to_json(), indent=2) + "\n", encoding="utf-8")
    for line in proof.summary():
        print(line)
    print("the same model" if proof.passed else "NOT the same model")
    return 0 if proof.passed else 1


def _open(path: Path, step: int | None, option: str) -> Any:
    from megatron_txssm.convert.hf_folder import is_hf_folder, open_hf_folder

    if not is_hf_folder(path):
        return open_checkpoint(path, step, option)
    if step is not None:
        raise UserError(f"{option} {step} is of checkpoints, but {path} is a Hugging Face folder; leave it out")
    return open_hf_folder(path)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
