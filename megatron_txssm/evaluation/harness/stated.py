"""What a run's recipe says of its evaluation, where the user says nothing else."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_txssm.checkpoint.saved_model import find_checkpoints
from megatron_txssm.convert.huggingface.folder import is_hf_folder
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.needed_data import check_tasks
from megatron_txssm.evaluation.harness.settings import HarnessSettings
from megatron_txssm.evaluation.harness.tasks import named_tasks, ruler_metadata
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import Evaluation
from megatron_txssm.recipe.settings.paths import is_task_file


def settings_for(
    model: Path,
    tasks: Sequence[str] | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int | None,
    *,
    data: Path | None,
    trust_recipe: bool = False,
) -> tuple[HarnessSettings, Path | None]:
    """The settings of an evaluation and its folder of data sets; None: as the run's recipe states them.

    The recipe's numbers belong to its tasks: with other `tasks` they do not count. UserError if it names task files,
    which may run code, and the checkpoint may be someone else's; `trust_recipe` accepts them.
    """
    stated = Evaluation() if is_hf_folder(model) else load_recipe(find_checkpoints(model) / "recipe.yaml").evaluation
    files = [] if tasks is not None or trust_recipe else [*filter(is_task_file, stated.tasks or ())]
    if files:
        raise UserError(
            f"the recipe of {model} has the task file {files[0]} in evaluation.tasks, and such files may run code; if "
            "you trust it, add --trust-recipe, otherwise name tasks with --tasks"
        )
    if data is None and stated.data is not None:
        data = Path(stated.data)
    if tasks is None and stated.tasks:
        tasks = stated.tasks
        num_fewshot = stated.num_fewshot if num_fewshot is None else num_fewshot
        limit = stated.limit if limit is None else limit
    named = tuple(named_tasks(["paper"] if tasks is None else tasks))
    return HarnessSettings(named, num_fewshot, limit, stated.batch_size if batch_size is None else batch_size), data


def check_stated_tasks(recipe: Recipe, *, afterwards: bool = True) -> None:
    """UserError if lm_eval has no task of a name in `evaluation.tasks`, or a training has no texts short enough.

    Also if `evaluation.data`, where that folder exists, lacks a data set that will be read: at the training's
    validations, or `afterwards`. Neither torch nor data are loaded; names that only lm_eval knows take seconds.
    """
    asked = recipe.evaluation
    names = named_tasks(asked.tasks) if asked.tasks else []
    reads = names and (afterwards or asked.interval is not None)
    data = Path(asked.data) if reads and asked.data and os.path.isdir(asked.data) else None
    with fields_named():
        check_tasks(names, data)
        if asked.interval is not None:
            ruler_metadata(names, recipe.training.seq_length, Path)


@contextmanager
def fields_named() -> Iterator[None]:
    """Errors name the recipe's fields instead of the options of `txssm eval harness`."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"(^|with )--(?=tasks|data)", r"\1evaluation.", str(error))) from error
