"""Checks of the tasks that are scored during and after the training."""

import os
import shlex

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.settings.paths import is_task_file


def check_evaluation(recipe: Recipe) -> None:
    """UserError if `evaluation.tasks` cannot be scored at this recipe's validations."""
    evaluation, logging = recipe.evaluation, recipe.logging
    if evaluation.tasks is None:
        if evaluation.interval is not None:
            raise UserError(f"evaluation.interval={evaluation.interval} needs evaluation.tasks; set it to null")
        return
    elsewhere = "leave it out, and use `txssm eval harness RUN --step N` on the checkpoints"
    if not evaluation.tasks:
        raise UserError("evaluation.tasks=[] names no task; use null for none")
    if evaluation.interval is None:
        return
    if logging.eval_iters == 0:
        raise UserError(
            f"evaluation.interval={evaluation.interval}: tasks are scored at validations, which logging.eval_iters=0 "
            "leaves out; set it to 1 or more"
        )
    if evaluation.interval % (logging.eval_interval or recipe.train_iters):
        raise UserError(
            f"evaluation.interval={evaluation.interval} is not a multiple of "
            f"logging.eval_interval={'null' if logging.eval_interval is None else logging.eval_interval}; tasks are "
            "scored at validations"
        )
    if recipe.data.tokenizer_type == "NullTokenizer" or recipe.megatron.get("mock_data"):
        raise UserError(f"evaluation.interval needs a tokenizer, which these data do not have; {elsewhere}")


def check_task_files(recipe: Recipe) -> None:
    """UserError unless the files of `evaluation.tasks` and the folder `evaluation.data` exist."""
    tasks, data = recipe.evaluation.tasks or (), recipe.evaluation.data
    for name in filter(is_task_file, tasks):
        if not os.path.isfile(name):
            raise UserError(f"evaluation.tasks: {name}: no such file; leave it out, or put it there")
    if tasks and data is not None and not os.path.isdir(data):
        names = shlex.join(name for name in tasks if not is_task_file(name))
        fetch = f"`txssm eval fetch {shlex.quote(data)} --tasks {names}` fills one" if names else "name one"
        raise UserError(f"evaluation.data={data}: no such folder; {fetch}, or set it to null")
