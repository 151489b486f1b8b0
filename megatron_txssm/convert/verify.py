"""Compares two models, each a checkpoint or a Hugging Face folder."""

import json
from pathlib import Path

from megatron_txssm.checkpoint.saved_model import open_checkpoint
from megatron_txssm.convert.conversion import conversion
from megatron_txssm.convert.huggingface.folder import is_hf_folder, open_hf_folder
from megatron_txssm.convert.proof.proof import Source, prove_equal
from megatron_txssm.errors import UserError


@conversion
def verify(
    a: str | Path,
    b: str | Path,
    *,
    step: int | None = None,
    step_b: int | None = None,
    proof_file: str | Path | None = None,
) -> int:
    """Compare tensors, logits and generated text of two models and print the proof; 0 if they are the same, else 1.

    a, b: a run, its checkpoints (`step` and `step_b`: which; None: the newest) or a Hugging Face folder. proof_file:
    also write the proof to this file, as JSON. UserError if the models have different tensors or cannot be read.
    """
    if proof_file and not Path(proof_file).absolute().parent.is_dir():
        raise UserError(f"--json {proof_file}: no such folder; make it first")
    proof = prove_equal(_open(Path(a), step, "--step"), _open(Path(b), step_b, "--step-b"))
    if proof_file:
        Path(proof_file).write_text(json.dumps(proof.to_json(), indent=2) + "\n", encoding="utf-8")
    for line in proof.summary():
        print(line)
    print("the same model" if proof.passed else "NOT the same model")
    return 0 if proof.passed else 1


def _open(path: Path, step: int | None, option: str) -> Source:
    if not is_hf_folder(path):
        return open_checkpoint(path, step, option)
    if step is not None:
        raise UserError(f"{option} {step} is of checkpoints, but {path} is a Hugging Face folder; leave it out")
    return open_hf_folder(path)
