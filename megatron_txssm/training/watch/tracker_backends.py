"""TensorBoard, Weights & Biases and MLflow as `Trackers` call them; a resumed run continues its run there."""

import dataclasses
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import batched
from pathlib import Path
from typing import Any

from megatron_txssm.compat import get_args, replace_tensorboard_writer
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import SECTIONS
from megatron_txssm.training.launch.preflight import saved_step
from megatron_txssm.training.watch.trackers import CLOSE_SECONDS, Event, Tracker, Trackers


@contextmanager
def tracking(recipe: Recipe, say: Callable[[str], None]) -> Iterator[Trackers | None]:
    """The trackers of a recipe, in the place of Megatron's TensorBoard writer; None if this rank has none.

    `say` shows a warning. At the end the trackers' runs end, after an exception as failed.
    """
    args = get_args()
    if args.rank != args.world_size - 1:
        yield None
        return
    trackers: list[Tracker] = []
    if recipe.logging.wandb_project is not None:
        trackers.append(WeightsAndBiases(recipe, args.wandb_entity or None, say))
    if recipe.logging.mlflow_experiment is not None:
        trackers.append(MLflow(recipe))
    found: list[Trackers] = []

    def replace(writer: Any) -> Trackers | None:
        everywhere = trackers if writer is None else [TensorBoard(writer), *trackers]
        found.extend([Trackers(everywhere, args.tensorboard_log_interval, say, writer)] if everywhere else [])
        return found[0] if found else None

    replace_tensorboard_writer(replace)
    exit_code = 1
    try:
        yield found[0] if found else None
        exit_code = 0
    except SystemExit as stop:
        exit_code = stop.code if isinstance(stop.code, int) else 1
        raise
    finally:
        if found:
            found[0].close(exit_code)


class TensorBoard:
    """Megatron's SummaryWriter, which also fails when its disk is full."""

    name = "TensorBoard"

    def __init__(self, writer: Any):
        self.writer = writer

    def open(self) -> None: ...

    def log(self, events: list[Event]) -> None:
        for event in events:
            for name, value in event.values.items():
                self.writer.add_scalar(name, value, event.step, event.time)

    def close(self, exit_code: int) -> None:
        self.writer.flush()


class WeightsAndBiases:
    """Without an answer of its server, the run is kept in RUN/wandb, for `wandb sync`.

    W&B rejects steps that it has seen, so those that a resumed run repeats are shown once.
    """

    name = "W&B"

    def __init__(self, recipe: Recipe, entity: str | None, say: Callable[[str], None]):
        # Here, not in the thread, where Megatron may be importing the same modules.
        import wandb

        self.wandb, self.say = wandb, say
        kept = kept_id(recipe, "wandb") or new_id(recipe, "wandb", uuid.uuid4().hex[:12])
        self.options: dict[str, Any] = {
            "entity": entity,
            "project": recipe.logging.wandb_project,
            "name": recipe.logging.wandb_name or recipe.name,
            "dir": str(recipe.run_path),
            # Variables that the user has set are kept.
            "id": os.environ.get("WANDB_RUN_ID", kept),
            "resume": os.environ.get("WANDB_RESUME", "allow"),
            "settings": wandb.Settings(finish_timeout=CLOSE_SECONDS),
        }
        self.fields = recipe_fields(recipe)
        self.run: Any = None

    def open(self) -> None:
        try:
            self.run = self.wandb.init(**self.options)
        except Exception as error:  # of many classes: no login, no network, no answer
            self.run = self.wandb.init(**self.options, mode="offline")
            self.say(
                f"warning: W&B does not take this run ({str(error).partition('\n')[0]}); it is kept, and can be sent "
                f"later: wandb sync {Path(self.run.dir).parent}"
            )
        # A resumed run may have changed fields.
        self.run.config.update(self.fields, allow_val_change=True)

    def log(self, events: list[Event]) -> None:
        for event in events:
            self.run.log(event.values, step=event.step)

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


class MLflow:
    """By its client, which keeps no state in the process; repeated steps are shown twice."""

    name = "MLflow"

    def __init__(self, recipe: Recipe):
        # MLflow would report its use to its makers.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow  # pyright: ignore[reportMissingImports]

        self.mlflow, self.recipe = mlflow, recipe
        folder = recipe.run_path / "mlflow"
        folder.mkdir(exist_ok=True)
        local = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self.uri = recipe.logging.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        self.run_id = os.environ.get("MLFLOW_RUN_ID") or kept_id(recipe, "mlflow")
        self.client: Any = None

    def open(self) -> None:
        self.client = self.mlflow.MlflowClient(tracking_uri=self.uri)
        if self.run_id is not None and self._is_there(self.run_id):
            self.client.update_run(self.run_id, status="RUNNING")
            return
        name = self.recipe.logging.mlflow_experiment
        experiment = self.client.get_experiment_by_name(name)
        number = self.client.create_experiment(name) if experiment is None else experiment.experiment_id
        run = self.client.create_run(number, run_name=self.recipe.logging.wandb_name or self.recipe.name)
        self.run_id = new_id(self.recipe, "mlflow", run.info.run_id)
        # Its limits: 100 parameters at once, 1000 numbers.
        params = [self.mlflow.entities.Param(name, str(value)) for name, value in recipe_fields(self.recipe).items()]
        for some in batched(params, 100):
            self.client.log_batch(self.run_id, params=some)

    def log(self, events: list[Event]) -> None:
        metric = self.mlflow.entities.Metric
        numbers = [
            metric(mlflow_name(name), value, round(event.time * 1000), event.step)
            for event in events
            for name, value in event.values.items()
        ]
        for some in batched(numbers, 1000):
            self.client.log_batch(self.run_id, metrics=some)

    def close(self, exit_code: int) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if exit_code else "FINISHED")

    def _is_there(self, run_id: str) -> bool:
        """False if it was deleted, or the run reports to another server now."""
        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except self.mlflow.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise


def mlflow_name(name: str) -> str:
    """A name without the characters that MLflow refuses."""
    return "".join(char if char.isalnum() or char in "_-. :/" else "_" for char in name)


def kept_id(recipe: Recipe, tracker: str) -> str | None:
    """The tracker's run that a resumed training continues; None for a training that begins at step 0."""
    file = recipe.run_path / tracker / "run_id"
    resumed = recipe.checkpoint.save_interval is not None and (saved_step(recipe.checkpoint_path) or 0) > 0
    return file.read_text(encoding="utf-8").strip() if resumed and file.is_file() else None


def new_id(recipe: Recipe, tracker: str, run_id: str) -> str:
    """Keep the id of a tracker's run for the next start; returns it."""
    file = recipe.run_path / tracker / "run_id"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{run_id}\n", encoding="utf-8")
    return run_id


def recipe_fields(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields by their dotted names."""
    whole, sections = dataclasses.asdict(recipe), (*SECTIONS, "megatron")
    return {"name": recipe.name} | {f"{of}.{name}": value for of in sections for name, value in whole[of].items()}
