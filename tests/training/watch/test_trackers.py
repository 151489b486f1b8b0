"""Trackers: all get the same events under the same names, and none stops a training, whatever it does."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.launch.preflight import check_trackers
from megatron_txssm.training.watch import tracker_backends, trackers
from megatron_txssm.training.watch.tracker_backends import MLflow, WeightsAndBiases, tracking
from megatron_txssm.training.watch.trackers import Event, Trackers


class Recorder:
    """A tracker that keeps what it is told; `faults`: how many of its calls of `log` fail."""

    name = "recorder"

    def __init__(self, faults: int = 0):
        self.faults = faults
        self.values: list[tuple[str, float, int]] = []
        self.exit_code: int | None = None
        self.has_step_5 = threading.Event()

    def open(self) -> None: ...

    def log(self, events: list[Event]) -> None:
        if self.faults > 0 and events:
            self.faults -= 1
            raise ConnectionError("no answer")
        self.values += [(name, value, event.step) for event in events for name, value in event.values.items()]
        if any(event.step == 5 for event in events):
            self.has_step_5.set()

    def close(self, exit_code: int) -> None:
        self.exit_code = exit_code


class Hanging(Recorder):
    name = "hanging"

    def open(self) -> None:
        threading.Event().wait()


def test_all_get_the_same_events_and_megatrons_of_the_same_number_are_left_out() -> None:
    told = [Recorder(), Recorder()]
    everywhere = Trackers([*told], interval=2, say=print)
    for step in (1, 2):
        for tag in ("lm loss", "grad-norm", "params-norm", "lm loss validation", "params-norm vs samples"):
            everywhere.add_scalar(tag, 7.0, step)
        everywhere.log_step({"iteration": step, "lm loss": 4.0, "skipped": False, "slow": {}, "mfu": None}, step)
    everywhere.log({"validation lm loss": 5.0}, 2)
    # Megatron calls what else it likes.
    everywhere.flush()
    everywhere.add_text("seed", "1", global_step=0)
    everywhere.close(0)
    expected = [("params-norm", 7.0, 1), ("params-norm", 7.0, 2), ("lm loss", 4.0, 2), ("skipped", 0.0, 2)]
    assert [each.values for each in told] == [[*expected, ("validation lm loss", 5.0, 2)]] * 2
    assert [each.exit_code for each in told] == [0, 0]


def test_one_that_fails_gets_its_events_again_and_one_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.0)
    said: list[str] = []
    failing = Recorder(faults=3)
    everywhere = Trackers([Hanging(), failing], interval=1, say=said.append)
    for step in range(1, 6):
        everywhere.log({"lm loss": float(step)}, step)
    assert failing.has_step_5.wait(60)
    everywhere.feeds[1].end(1)
    everywhere.feeds[1].join(60)
    everywhere.close(1)
    assert [value for _, value, _ in failing.values] == [1.0, 2.0, 3.0, 4.0, 5.0] and failing.exit_code == 1
    assert said == [
        "warning: recorder failed, while the training goes on: 'ConnectionError: no answer'",
        "warning: hanging has not taken everything after 0 s; going on without",
    ]


def a_recipe(folder: Path, *fields: str) -> Recipe:
    return load_recipe("demo_cpu", [f"run_directory={folder}", "logging.wandb_project=trial", *fields])


def save(recipe: Recipe, step: str) -> None:
    recipe.checkpoint_path.mkdir(parents=True, exist_ok=True)
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text(step)


class FakeWandb(ModuleType):
    """W&B without a server: init fails unless offline."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.Settings = SimpleNamespace

    def init(self, mode: str = "online", **options: Any) -> Any:
        if mode != "offline":
            raise ConnectionError("no network\nat all")
        self.started.append(options)
        return SimpleNamespace(dir="/kept/files", config=SimpleNamespace(update=lambda fields, **_: None))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    return fake


def start(recipe: Recipe, fake: FakeWandb) -> str:
    """The identity that a new start tells W&B."""
    WeightsAndBiases(recipe, None, print).open()
    return fake.started[-1]["id"]


def test_a_resumed_run_keeps_its_identity(tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = a_recipe(tmp_path / "a")
    first = start(recipe, wandb)
    again = start(recipe, wandb)
    assert first and again != first, "nothing was saved: it begins at step 0 again"
    save(recipe, "release")
    kept = start(recipe, wandb)
    assert kept not in (first, again), "so does it from imported weights"
    save(recipe, "20")
    assert start(recipe, wandb) == start(recipe, wandb) == kept
    assert start(a_recipe(tmp_path / "b"), wandb) != kept
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert start(recipe, wandb) == "mine"


def test_without_an_answer_the_run_is_kept_for_later(tmp_path: Path, wandb: FakeWandb) -> None:
    said: list[str] = []
    WeightsAndBiases(a_recipe(tmp_path), None, said.append).open()
    assert said == [
        "warning: W&B does not take this run (no network); it is kept, and can be sent later: wandb sync /kept"
    ]


class FakeMLflow(ModuleType):
    """MLflow's client and server."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, str] = {}
        self.MlflowException = type("MlflowException", (Exception,), {"error_code": "RESOURCE_DOES_NOT_EXIST"})
        self.entities = SimpleNamespace(Metric=lambda *fields: fields, Param=lambda *fields: fields)

    def MlflowClient(self, tracking_uri: str) -> "FakeMLflow":
        self.uri = tracking_uri
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, "7")

    def create_run(self, experiment: str, run_name: str) -> Any:
        number = f"run{len(self.runs)}"
        self.runs[number] = {"status": "RUNNING", "name": run_name, "metrics": [], "params": []}
        return SimpleNamespace(info=SimpleNamespace(run_id=number))

    def get_run(self, run_id: str) -> Any:
        if run_id not in self.runs:
            raise self.MlflowException
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    set_terminated = update_run

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000 and len(params) <= 100
        self.runs[run_id]["metrics"] += metrics
        self.runs[run_id]["params"] += params


def test_mlflow_sees_one_run_over_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = a_recipe(tmp_path, "logging.mlflow_experiment=trial")
    for start in range(3):
        tracker = MLflow(recipe)
        tracker.open()
        tracker.log([Event(start, 1.5, {"validation-a+b lm loss": 4.0}), *[Event(9, 2.0, {"x": 1.0})] * 1500])
        assert fake.runs["run0"]["status"] == "RUNNING"
        tracker.close(start % 2)
        save(recipe, "20")
    assert list(fake.runs) == ["run0"] and fake.runs["run0"]["status"] == "FINISHED"
    assert fake.runs["run0"]["metrics"][0] == ("validation-a_b lm loss", 4.0, 1500, 0)
    assert len(fake.runs["run0"]["metrics"]) == 3 * 1501
    assert ("training.seq_length", "256") in fake.runs["run0"]["params"]
    assert fake.uri == f"sqlite:///{tmp_path.resolve()}/mlflow/mlflow.db"
    # Another server does not know it.
    fake.runs.clear()
    MLflow(recipe).open()
    assert list(fake.runs) == ["run0"]


def test_the_last_rank_alone_has_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of Megatron's writer."""
    writers: list[Any] = []
    monkeypatch.setattr(tracker_backends, "replace_tensorboard_writer", lambda replace: writers.append(replace(None)))
    recipe = a_recipe(tmp_path, "logging.wandb_project=null")
    for rank in (0, 1):
        args = SimpleNamespace(rank=rank, world_size=2, tensorboard_log_interval=1, wandb_entity="")
        monkeypatch.setattr(tracker_backends, "get_args", lambda args=args: args)
        with tracking(recipe, print) as found:
            assert found is None
    assert writers == [None], "rank 1 has none, as it is to report to none"


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging\.mlflow_experiment=trial needs mlflow: pip install mlflow"):
        check_trackers(a_recipe(tmp_path, "logging.wandb_project=null", "logging.mlflow_experiment=trial"))


SCRIPT = """
import json, sys
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training.watch.tracker_backends import WeightsAndBiases
from megatron_txssm.training.watch.trackers import Event

recipe = load_recipe("demo_cpu", [f"run_directory={sys.argv[1]}", "logging.wandb_project=trial"])
tracker = WeightsAndBiases(recipe, None, print)
tracker.open()
tracker.log([Event(1, 1.0, {"lm loss": 4.0})])
print(json.dumps([tracker.run.id, tracker.run.settings.resume, dict(tracker.run.config)["training.seq_length"]]))
tracker.close(0)
"""


@pytest.mark.slow
def test_wandb_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, by W&B itself."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "wandb" / "run_id").read_text().strip()
    assert json.loads(done.stdout.splitlines()[-1]) == [kept, "allow", 256]
    assert [path for path in (tmp_path / "wandb").iterdir() if path.name.endswith(f"-{kept}")]
