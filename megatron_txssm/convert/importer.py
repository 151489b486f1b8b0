"""txssm convert import: a Megatron checkpoint of weights in a folder, complete or not there at all."""

import argparse
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_txssm.checkpoint.tensors import is_kept_in_fp32
from megatron_txssm.convert.hf_folder import open_hf_folder
from megatron_txssm.data.tokenizer.install import install_tokenizer
from megatron_txssm.errors import UserError, readable
from megatron_txssm.files import check_absent, complete_folder
from megatron_txssm.recipe.corpus_recipe import TokenizerSource
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.terminal import doing


def import_weights(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from megatron_txssm.convert.proof import prove_import
    from megatron_txssm.convert.worker import run_task

    check_absent(args.out)
    source = open_hf_folder(args.folder, load_recipe(args.recipe) if args.recipe else None)
    with complete_folder(args.out, _checkpoint_bytes(source.recipe, source.shapes)) as folder:
        (folder / "recipe.yaml").write_text(_as_yaml(source.recipe), encoding="utf-8")
        with doing("building the model in Megatron"):
            run_task("save_megatron", folder=args.folder.absolute(), recipe=folder / "recipe.yaml", out=folder)
        _keep_tokenizer(args.folder, folder)
        proof = None if args.no_verify else prove_import(source, folder)
    stated = args.recipe is not None or (args.folder / "recipe.yaml").is_file()
    if not stated:
        print(
            f"{args.out / 'recipe.yaml'}: the model as config.json describes it; its data and training are yours to set"
        )
    recipe = "RECIPE" if stated else args.out / "recipe.yaml"
    print(
        f"{args.out}: from layout {source.layout}; "
        f"train on with `txssm pretrain {recipe} --set checkpoint.load_from={args.out}`"
    )
    for line in proof.summary() if proof else ():
        print(line)
    return 0


def _as_yaml(recipe: Recipe) -> str:
    """The recipe without the places where the weights were trained, which are not this checkpoint's."""
    checkpoint = replace(recipe.checkpoint, directory=None, load_from=None)
    return replace(recipe, run_directory=None, checkpoint=checkpoint).to_yaml()


def _checkpoint_bytes(recipe: Recipe, shapes: dict[str, Any]) -> int:
    weight = 2 if recipe.training.precision == "bf16" else 4
    sizes = {name: 4 if is_kept_in_fp32(name) else weight for name in shapes}
    return sum(math.prod(shape) * sizes[name] for name, shape in shapes.items())


def _keep_tokenizer(source: Path, folder: Path) -> None:
    """Copy the folder's tokenizer beside the checkpoint, where it has one that says what ends a document."""
    if (source / "tokenizer.model").is_file():
        tokenizer = TokenizerSource(type="SentencePieceTokenizer", model=str(source / "tokenizer.model"))
    elif (source / "tokenizer.json").is_file():
        tokenizer = TokenizerSource(type="HuggingFaceTokenizer", model=str(source))
    else:
        return
    try:
        install_tokenizer(tokenizer, folder / "tokenizer")
    except UserError as error:
        print(readable(f"warning: the tokenizer is not imported: {error}"), file=sys.stderr)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
