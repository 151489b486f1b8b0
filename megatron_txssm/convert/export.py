"""Exports a checkpoint's weights as a Hugging Face folder, completely or not at all."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.checkpoint.tensors import DTYPES
from megatron_txssm.convert.conversion import conversion
from megatron_txssm.convert.formats.format import FORMATS, Format, choose_format
from megatron_txssm.errors import UserError
from megatron_txssm.files import append_json, check_absent, complete_folder, file_sha256
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.terminal import progress_bar

if TYPE_CHECKING:
    from megatron_txssm.convert.huggingface.weights import Export
    from megatron_txssm.convert.proof.proof import Proof


@conversion
def export(
    run: str | Path,
    out: str | Path,
    *,
    format: Format | None = None,
    dtype: str | None = None,
    step: int | None = None,
    recipe: str | Path | None = None,
    max_file_gb: float = 2.0,
    verify: bool = True,
) -> int:
    """Write a checkpoint's weights to the new folder `out`, as a Hugging Face model; returns the exit code.

    run: a run's folder, or its checkpoints (`step`: which; None: the newest). format: the names and classes to use
    (None: llama if it fits, otherwise transxssm). dtype: a key of DTYPES (None: as saved); with bf16, tensors that
    training keeps in fp32 stay fp32. recipe: the recipe of the training (None: recipe.yaml beside the checkpoints).
    max_file_gb: largest file, in 1e9 bytes. verify: prove that the folder holds the same model, and keep it only then.
    UserError if the model cannot be exported.
    """
    out = Path(out)
    if not max_file_gb > 0:
        raise UserError(f"--max-file-gb {max_file_gb:g} must be above 0")
    for option, value, known in (("layout", format, FORMATS), ("dtype", dtype, DTYPES)):
        if value is not None and value not in known:
            raise UserError(f"--{option} {value} is unknown; use one of {', '.join(known)}")
    check_absent(out)
    saved = open_checkpoint(Path(run), step, recipe=load_recipe(recipe) if recipe else None)
    # Imported late: they import transformers, which would delay error messages for mistyped paths.
    from megatron_txssm.convert.export_files import write_configuration, write_model_card, write_tokenizer
    from megatron_txssm.convert.huggingface.weights import Export, write_weights
    from megatron_txssm.convert.proof.proof import prove_export

    planned = Export(saved, choose_format(saved.recipe, format), dtype)
    with complete_folder(out, planned.nbytes) as folder:
        with progress_bar("exporting", planned.nbytes, of_bytes=True) as advance:
            hashes = write_weights(planned, folder, max_file_bytes=int(max_file_gb * 1e9), advance=advance)
        if recipe or saved.prediction_depths:
            (folder / "recipe.yaml").write_text(saved.recipe.to_yaml(), encoding="utf-8")
        else:
            shutil.copyfile(saved.checkpoints / "recipe.yaml", folder / "recipe.yaml")
        write_configuration(planned, write_tokenizer(planned, folder), folder)
        proof = prove_export(saved, folder, hashes) if verify else None
        write_model_card(planned, folder, out.name, proof)
        _write_facts(planned, folder)
    _note_conversion(planned, out, proof)
    what = f"step {saved.step}, layout {planned.format}, {planned.numel:,} parameters, {planned.nbytes:,} bytes"
    print(f"{out}: {what}")
    if depths := saved.prediction_depths:
        print(f"left out: multi-token prediction, {depths} depth{'s' if depths > 1 else ''}: only training needs it")
    for line in proof.summary() if proof else ():
        print(line)
    return 0


def _write_facts(planned: "Export", folder: Path) -> None:
    """Write export.json: what was exported, and the hash of every file."""
    recipe = planned.saved.recipe
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {
        "name": recipe.name,
        "step": planned.saved.step,
        "layout": planned.format,
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in planned.tensors.values()}),
        "parameters": planned.numel,
        "vocab_size": recipe.data.vocab_size,
        "padding_rows_removed": recipe.padded_vocab_size - recipe.data.vocab_size,
        "sha256": {str(file.relative_to(folder)): file_sha256(file) for file in files},
    }
    (folder / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _note_conversion(planned: "Export", out: Path, proof: "Proof | None") -> None:
    """Append to RUN/conversions.jsonl, for `txssm report`, if the checkpoints are in a run's folder that is writable.

    The time is in seconds since the epoch; "proof" has the lines of its summary, none if it was not asked for.
    """
    run = planned.saved.checkpoints.parent
    fact = {
        "time": round(time.time(), 3),
        "step": planned.saved.step,
        "out": os.path.abspath(out),
        "layout": planned.format,
        "parameters": planned.numel,
        "bytes": planned.nbytes,
        "proof": [] if proof is None else list(proof.summary()),
    }
    if (run / "recipe.yaml").is_file():
        with contextlib.suppress(OSError):
            append_json(run / "conversions.jsonl", fact)
