"""Scores of lm_eval's tasks at a training's validations (`evaluation.interval`), by the model in training."""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_txssm.checkpoint.load import LoadedModel, plain_texts
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.divided import DividedModel, reads_whole_texts
from megatron_txssm.evaluation.harness.harness import Evaluation, exported_tokenizer, load_for, responses_to
from megatron_txssm.evaluation.harness.settings import HarnessSettings, ModelIdentity
from megatron_txssm.evaluation.harness.stated import fields_named
from megatron_txssm.evaluation.harness.tasks import named_tasks
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.hooks import Call, Listener

if TYPE_CHECKING:
    from megatron_txssm.evaluation.harness.tasks import LoadedTasks
    from megatron_txssm.training.watch.monitor import TrainingMonitor


def train_and_score(recipe: Recipe, terminal: TextIO) -> None:
    """Train a recipe as one worker, and score the tasks that it names."""
    from megatron_txssm.training.pretrain import pretrain

    if recipe.evaluation.interval is None:
        pretrain(recipe, terminal)
    else:
        pretrain(recipe, terminal, after=plain_texts(), listeners=[partial(TaskScores, recipe)])


class TaskScores(Listener):
    """Listens to validations: all ranks compute, rank 0 runs lm_eval; each keeps its random states.

    A score is a line of metrics.jsonl, {"iteration": step, "scores": {"TASK/METRIC": value}}, a number of the trackers,
    and, with its standard error and all that belongs to it, a line of RUN/evaluation/harness/history.jsonl.
    """

    def __init__(self, recipe: Recipe, monitor: "TrainingMonitor"):
        self.recipe, self.monitor = recipe, monitor
        asked = recipe.evaluation
        tasks = tuple(named_tasks(asked.tasks or ()))
        self.settings = HarnessSettings(tasks, asked.num_fewshot, asked.limit, asked.batch_size)
        self.data = None if asked.data is None else Path(asked.data)
        # Of rank 0.
        self.tasks: LoadedTasks | None = None
        self.scored: int | None = None

    def after_setup(self, call: Call, result: tuple[list[Any], object, object]) -> None:
        from megatron.core.utils import unwrap_model

        self.stages = unwrap_model(result[0])
        if self.monitor.args.rank == 0:
            # Here, as their data may be missing.
            with fields_named(), tempfile.TemporaryDirectory(prefix="txssm-tokenizer-") as folder:
                tokenizer = partial(exported_tokenizer, self.recipe, self.recipe.checkpoint_path, Path(folder))
                length = self.recipe.training.seq_length
                self.tasks = load_for(self.settings, self.data, length, tokenizer)
            kinds = {name: task.OUTPUT_TYPE for name, task in self.tasks.tasks["tasks"].items()}
            check_generation(self.recipe, kinds)

    def after_validation(self, call: Call, result: object) -> None:
        step = self.monitor.iteration
        interval = self.recipe.evaluation.interval
        if step is None or interval is None or step == self.scored:
            return
        if step % interval and step != self.recipe.train_iters:
            return
        self.scored = step
        began = time.monotonic()
        with in_evaluation_mode(self.stages):
            scores = self._scores(step)
        if scores:
            self.monitor.on_scores(scores, time.monotonic() - began)

    def _scores(self, step: int) -> dict[str, float]:
        """ "TASK/METRIC" -> its value, on every rank."""
        import torch.distributed
        from megatron.training import get_tokenizer

        from megatron_txssm.evaluation.harness.ranks import Replicas

        loaded = LoadedModel(self.stages[0], get_tokenizer(), self.recipe, step)
        ranks = Replicas(DividedModel(self.stages, loaded, self.recipe.checkpoint_path))
        box: list[dict[str, float]] = [{}]
        if self.tasks is None:
            ranks.follow()
        else:
            box = [self._ask(step, ranks)]
            ranks.end()
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _ask(self, step: int, ranks: Any) -> dict[str, float]:
        from megatron_txssm.evaluation.harness.results import keep, scores

        assert self.tasks is not None
        described = f"step {step} of {self.recipe.name}, in training"
        training = self.recipe.training
        precision = training.precision if training.fp8 is None else f"{training.precision}, FP8"
        model = ModelIdentity(described, "training", step, "", precision)
        output = self.recipe.run_path / "evaluation" / "harness"
        folder = output / model.folder_name(self.settings, self.monitor.args.world_size)
        # Those of an attempt that came here with other weights.
        (folder / "responses.jsonl").unlink(missing_ok=True)
        evaluation = Evaluation(model, self.settings, self.data, folder)
        try:
            results = responses_to(evaluation, self.tasks, ranks, lambda what, total: nullcontext(lambda count: None))
            keep(results, folder)
        except (OverflowError, UserError) as error:
            # The perplexity of a model that knows nothing, a text too long for it, a full disk: no reason to end its
            # training.
            self.monitor.say(f"warning: iteration {step}: evaluation.tasks have no scores ({error})")
            return {}
        return scores(results)


def check_generation(recipe: Recipe, kinds: Mapping[str, str]) -> None:
    """UserError if a task generates texts, which the recipe's model cannot while it trains; `kinds`: by task."""
    generating = [name for name, kind in kinds.items() if kind == "generate_until"]
    if generating and (not reads_whole_texts(recipe) or recipe.prediction_depths):
        raise UserError(
            f"evaluation.tasks: {generating[0]} generates texts token by token, which sequence, pipeline, context and "
            "expert parallelism, FP8 and prediction depths do not allow in a training; leave evaluation.interval out, "
            "and use `txssm eval harness RUN`"
        )


@contextmanager
def in_evaluation_mode(stages: list[Any]) -> Iterator[None]:
    """A model's stages in evaluation mode; the random states and the environment that lm_eval changes are restored."""
    import random

    import numpy as np
    import torch

    # lm_eval draws examples and bootstraps by the global generators.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    environment = os.environ.get("DISABLE_MULTIPROC")
    for stage in stages:
        stage.eval()
    try:
        yield
    finally:
        for stage in stages:
            stage.train()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if environment is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
