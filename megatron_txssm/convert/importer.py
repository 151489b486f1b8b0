"""Creates a Megatron checkpoint from the weights in a Hugging Face folder, completely or not at all."""

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from megatron_txssm.checkpoint.tensors import is_kept_in_fp32, model_shapes
from megatron_txssm.convert.conversion import conversion
from megatron_txssm.convert.from_transformer import FromTransformer, transxssm_of
from megatron_txssm.convert.huggingface.folder import open_hf_folder
from megatron_txssm.convert.proof.proof import prove_import
from megatron_txssm.convert.proof.worker import run_task
from megatron_txssm.data.tokenizer.install import install_tokenizer
from megatron_txssm.errors import UserError, readable
from megatron_txssm.files import check_absent, complete_folder
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.terminal import doing


@conversion
def import_weights(
    folder: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    as_transxssm: bool = False,
    verify: bool = True,
) -> int:
    """Create the checkpoints folder `out`, for further training, from a Hugging Face folder; returns the exit code.

    recipe: describes the model and its training (None: recipe.yaml in the folder, otherwise its config.json).
    as_transxssm: begin a TransXSSM from the folder's Transformer (from_transformer.py). verify: prove that both hold
    the same model, or the same weights in a TransXSSM, and keep the checkpoint only then. UserError if the folder
    cannot be imported.
    """
    hf, out = Path(folder), Path(out)
    check_absent(out)
    opened = open_hf_folder(hf, load_recipe(recipe) if recipe else None)
    source = FromTransformer(opened, transxssm_of(opened.recipe)) if as_transxssm else opened
    with complete_folder(out, _checkpoint_bytes(source.recipe)) as made:
        (made / "recipe.yaml").write_text(_as_yaml(source.recipe), encoding="utf-8")
        with doing("building the model in Megatron"):
            run_task(
                "save_megatron",
                folder=hf.absolute(),
                recipe=made / "recipe.yaml",
                out=made,
                as_transxssm=as_transxssm,
                stated_by=str(recipe) if recipe else None,
            )
        _keep_tokenizer(hf, made)
        proof = prove_import(source, made) if verify else None
    stated = not as_transxssm and (recipe is not None or (hf / "recipe.yaml").is_file())
    if not stated:
        model = "begun from a Transformer" if as_transxssm else "as config.json describes it"
        print(f"{out / 'recipe.yaml'}: the model {model}; its data and training are yours to set")
    train_by = "RECIPE" if stated else out / "recipe.yaml"
    print(
        f"{out}: from layout {opened.format}; "
        f"train on with `txssm pretrain {train_by} --set checkpoint.load_from={out}`"
    )
    for line in proof.summary() if proof else ():
        print(line)
    return 0


def _as_yaml(recipe: Recipe) -> str:
    """The recipe without the folders of the original training, which do not apply to this checkpoint."""
    checkpoint = replace(recipe.checkpoint, directory=None, load_from=None, branch_from=None)
    return replace(recipe, run_directory=None, checkpoint=checkpoint).to_yaml()


def _checkpoint_bytes(recipe: Recipe) -> int:
    weight = 2 if recipe.training.precision == "bf16" else 4
    shapes = model_shapes(recipe)
    return sum(math.prod(shape) * (4 if is_kept_in_fp32(name) else weight) for name, shape in shapes.items())


def _keep_tokenizer(source: Path, folder: Path) -> None:
    """Copy the folder's tokenizer beside the checkpoint, if it has one with an end-of-document token."""
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
