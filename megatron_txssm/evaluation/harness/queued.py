"""What a Slurm job of `txssm eval harness` is told, after the checks that would fail there."""

from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.checkpoint.saved_model import find_checkpoints, step_folder
from megatron_txssm.convert.huggingface.folder import is_hf_folder
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.harness import (
    check_files,
    harness_folder,
    harness_recipe,
    option_words,
    placed,
)
from megatron_txssm.evaluation.harness.needed_data import check_tasks
from megatron_txssm.evaluation.harness.settings import HarnessSettings
from megatron_txssm.recipe.validation.validate import validate


def job_words(
    model: Path,
    settings: HarnessSettings,
    processes: int,
    *,
    data: Path | None = None,
    output: Path | None = None,
    step: int | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """The job's folder, where its results go, and the arguments of its `txssm eval harness`.

    The step is named, so that a job that is queued again goes on with the same checkpoint. UserError for a missing
    checkpoint, folder, task or data set, and for a number of processes that the model cannot be divided over.
    """
    check_files(settings, data)
    check_tasks(settings.tasks, data)
    folder = (output or harness_folder(model)).absolute()
    if is_hf_folder(model):
        if step is not None or overrides:
            raise UserError(f"{model} is a Hugging Face model; --step and --set are for checkpoints")
        if processes != 1:
            raise UserError(
                f"{model} is a Hugging Face model, which one process evaluates, not {processes}; use --nodes 1 with "
                "--gpus-per-node 1 or --nproc-per-node 1"
            )
    else:
        checkpoints = find_checkpoints(model)
        step, _ = step_folder(checkpoints, step)
        validate(placed(harness_recipe(checkpoints, overrides), folder, checkpoints, processes), processes)
    changes = [word for field in overrides for word in ("--set", field)]
    options = option_words(settings, data and data.absolute(), folder, step)
    return folder, [str(model.absolute()), *changes, *options]
