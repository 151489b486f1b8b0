"""txssm convert export: a run's weights in a folder of safetensors, complete or not there at all."""

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_txssm.checkpoint.export import DTYPES, SavedModel, Tensor, export, open_checkpoint, tensors_of
from megatron_txssm.cli import add_verb
from megatron_txssm.errors import UserError
from megatron_txssm.launch.environment import adopt_slurm_step
from megatron_txssm.recipe.recipe import Recipe

EXAMPLES = (
    "txssm convert export runs/demo exports/demo",
    "txssm convert export runs/transxssm_1.3b/checkpoints exports/transxssm_1.3b --dtype bf16",
    "txssm convert export runs/transxssm_1.3b exports/at_20000 --step 20000 --max-file-gb 5",
)
LAYOUTS = ("megatron",)
# What makes a tokenizer, of the files in its folder; the rest may be a whole model.
_TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "convert", EXAMPLES[:1])
    commands = parser.add_subparsers(title="commands", dest="command", metavar="<command>", required=True)
    summary = "write a checkpoint's weights as safetensors, whatever layout it was saved at; no GPU needed"
    command = commands.add_parser(
        "export",
        help=summary,
        description=summary[0].upper() + summary[1:] + ". Vocabulary padding, optimizer and random states stay behind.",
        epilog="\n  ".join(["examples:", *EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's folder, or its checkpoints")
    command.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    command.add_argument(
        "--layout", choices=LAYOUTS, default="megatron", help="names and tensors as Megatron's checkpoint has them"
    )
    command.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of the weights (default: as saved); bf16 leaves A_log, dt_bias and D in fp32, as training does",
    )
    command.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    command.add_argument(
        "--max-file-gb", type=float, default=2.0, metavar="GB", help="largest file, in 1e9 bytes (default: 2)"
    )


def run(args: argparse.Namespace) -> int:
    adopt_slurm_step()
    # Of several tasks of a Slurm step, one is enough.
    if os.environ.get("RANK", "0") != "0":
        return 0
    if not args.max_file_gb > 0:
        raise UserError(f"--max-file-gb {args.max_file_gb:g} must be above 0")
    _check_absent(args.out)
    saved = open_checkpoint(args.checkpoint, args.step)
    nbytes = sum(tensor.nbytes for tensor in tensors_of(saved, args.dtype))
    with complete_folder(args.out, nbytes) as folder:
        with progress_bar(nbytes) as advance:
            tensors = export(
                saved, folder, dtype=args.dtype, max_file_bytes=int(args.max_file_gb * 1e9), advance=advance
            )
        shutil.copyfile(saved.checkpoints / "recipe.yaml", folder / "recipe.yaml")
        facts = _facts(args, saved, tensors, folder)
        (folder / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"{args.out}: step {saved.step}, {facts['parameters']:,} parameters, {nbytes:,} bytes")
    return 0


def _facts(args: argparse.Namespace, saved: SavedModel, tensors: list[Tensor], folder: Path) -> dict[str, Any]:
    """What export.json holds; copies the tokenizer."""
    recipe = saved.recipe
    tokenizer = copy_tokenizer(recipe, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "name": recipe.name,
        "step": saved.step,
        "layout": args.layout,
        "dtype": args.dtype or "as saved",
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "parameters": sum(tensor.numel for tensor in tensors),
        "vocab_size": recipe.data.vocab_size,
        "padding_rows_removed": recipe.padded_vocab_size - recipe.data.vocab_size,
        "tokenizer_type": recipe.data.tokenizer_type if tokenizer is None else recipe.tokenizer_type,
        "tokenizer": tokenizer,
        "sha256": {str(file.relative_to(folder)): _sha256(file) for file in files},
    }


def copy_tokenizer(recipe: Recipe, folder: Path) -> str | None:
    """Copy a local tokenizer's files to tokenizer/; returns where they are now, or the tokenizer's name on the hub.

    None where the recipe has none, or its corpus, which holds it, is out of reach.
    """
    try:
        name = recipe.tokenizer_model
    except UserError as error:
        print(f"warning: no tokenizer is exported: {error}", file=sys.stderr)
        return None
    if name is None:
        return None
    source, target = Path(name), folder / "tokenizer"
    files = [source] if source.is_file() else [file for kind in _TOKENIZER_FILES for file in sorted(source.glob(kind))]
    for file in files:
        target.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.name)
    if source.is_file():
        return f"tokenizer/{source.name}"
    return "tokenizer" if files else name


@contextmanager
def complete_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` where the block ends, and is removed where it fails.

    UserError where `out` exists, its parent cannot be written, or the disk has less than `nbytes` left or fills up.
    """
    _check_absent(out)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{out.parent} cannot be written: {error.strerror}; name another OUT") from None
    try:
        if shutil.disk_usage(partial).free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield partial
        partial.rename(out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror}; it takes {nbytes:,} bytes: make room, or name another OUT"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_absent(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; name another OUT, or remove it")


@contextmanager
def progress_bar(nbytes: int) -> Iterator[Callable[[int], None]]:
    """A function to tell of bytes that are done; a bar, where a person looks on, from the fifth second on."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("exporting"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), disable=not sys.stdout.isatty()
    )
    task, shown_from = progress.add_task("", total=nbytes), time.monotonic() + 5

    def advance(count: int) -> None:
        progress.advance(task, count)
        if time.monotonic() > shown_from:
            progress.start()

    try:
        yield advance
    finally:
        progress.stop()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
