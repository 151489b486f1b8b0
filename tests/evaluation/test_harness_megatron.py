"""txssm eval harness on a checkpoint: tensor-parallel and in replicas, the same numbers as of its export."""

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_txssm.cli.main import main
from megatron_txssm.convert.export import export
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness import harness as harness_command
from megatron_txssm.evaluation.harness.harness import evaluate_tasks, harness_recipe
from megatron_txssm.evaluation.harness.settings import HarnessSettings
from megatron_txssm.evaluation.harness.stated import settings_for
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from tests.data.corpus_fixture import corpus_of, make_corpus, random_documents
from tests.evaluation.tiny_tasks import write_tasks
from tests.support.megatron_tasks import run_tasks, train
from tests.support.recipes import write_recipe

TP2 = ("parallel.tensor_model_parallel_size=2",)


def evaluate(run: Path, tasks: list[str], output: Path, overrides: tuple[str, ...]) -> None:
    """A task: a worker of `txssm eval harness`."""
    from megatron_txssm.training import pretrain
    from megatron_txssm.training.launch.preflight import check_run, make_run_directory

    def work(recipe: Any, worker: Any) -> int:
        check_run(recipe, torch.distributed.get_world_size())
        make_run_directory(recipe)
        worker(recipe, io.StringIO())
        return 0

    run_worker, pretrain.run_worker = pretrain.run_worker, work
    # The training's remains on these ranks.
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        evaluate_tasks(run, HarnessSettings(tuple(tasks), num_fewshot=1), output=output, overrides=overrides)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "an evaluation would not stop on Ctrl-C"
    finally:
        signal.signal(signal.SIGTERM, handler)
        pretrain.run_worker = run_worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ of two steps at TP 2, its export, and evaluations of both: tp2/, replicas/, export/evaluation/harness/."""
    made = tmp_path_factory.mktemp("megatron")
    corpus = make_corpus(made / "corpus", {"web": [random_documents(40, seed=0)]})
    fields = {"training.train_iters": 2, "checkpoint.save_interval": 2, "optimizer.learning_rate": 1e-2}
    parallel = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
    model = {"model.init_method_std": 0.3, "megatron.num_workers": 0}
    recipe = write_recipe(made / "recipe.yaml", corpus_of(corpus), fields, parallel, model, run=made / "run")
    tasks = [str(file) for file in write_tasks(made / "tasks").values()]
    common = {"run": made / "run", "tasks": tasks}
    # By the run's own layout, and by another.
    run_tasks(
        2,
        [
            (train, {"recipe": recipe}),
            (evaluate, common | {"output": made / "tp2", "overrides": ()}),
            (evaluate, common | {"output": made / "replicas", "overrides": ("parallel.tensor_model_parallel_size=1",)}),
        ],
        made / "ranks",
    )
    assert export(made / "run", made / "export", verify=False) == 0
    assert main(["eval", "harness", str(made / "export"), "--num-fewshot", "1", "--tasks", *tasks]) == 0
    return made


def read(output: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(results, responses)"""
    [results] = output.glob("*/results.json")
    lines = (results.parent / "responses.jsonl").read_text().splitlines()
    return json.loads(results.read_text()), {key: value for line in lines for key, value in json.loads(line).items()}


def test_each_way_computes_the_same(folder: Path) -> None:
    ways = [read(output) for output in (folder / "tp2", folder / "replicas", folder / "export/evaluation/harness")]
    (first, wanted), *others = ways
    assert [results["settings"]["replicas"] for results, _ in ways] == [1, 2, 1]
    assert first["truncated_requests"] > 0 and len(wanted) > 36
    for results, found in others:
        compared = 0
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            if isinstance(value, str):
                # Of bytes that are no UTF-8, SentencePiece and the tokenizers library make different characters.
                assert value == wanted[key] or "\ufffd" in value
                compared += value == wanted[key]
            else:
                torch.testing.assert_close(torch.tensor(value), torch.tensor(wanted[key]), atol=1e-4, rtol=0)
        assert compared > 0
        for name, task in results["tasks"].items():
            assert task["sha256"] == first["tasks"][name]["sha256"]
            for metric, value in task["metrics"].items():
                assert value["value"] == pytest.approx(first["tasks"][name]["metrics"][metric]["value"], abs=1e-5)


def test_the_checkpoint_is_named(folder: Path) -> None:
    results, _ = read(folder / "tp2")
    assert results["model"]["step"] == 2 and results["model"]["computed_by"] == "megatron"
    assert results["model"]["precision"] == "fp32" and len(results["model"]["sha256"]) == 64


def test_workers_get_every_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder of the results is that of the launcher."""
    started: list[Any] = []
    monkeypatch.setattr(harness_command, "launch", lambda *words, **options: started.append((words, options)) or 0)
    words = ["--num-fewshot", "0", "--limit", "3", "--batch-size", "2", "--data", str(folder)]
    tasks = ["--tasks", "piqa", "mmlu"]
    command = ["eval", "harness", str(folder / "run"), *words, "--set", "training.precision=bf16", *tasks]
    assert main(command) == 0
    [((recipe, processes, worker), options)] = started
    assert processes == 2 and str(recipe.run_path).startswith(str(folder / "run/evaluation/harness/step_2-"))
    assert str(recipe.run_path) in options["resumes"]
    assert recipe.training.precision == "bf16"
    assert main(worker) == 0
    assert started[1][0][0] == recipe and started[1][0][2] == worker


def test_no_process_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "harness", str(folder / "run"), "--nproc", "0", "--tasks", "piqa"]) == 2
    assert "--nproc 0 must be at least 1" in capsys.readouterr().err


def test_the_recipe_states_what_is_asked(folder: Path, tmp_path: Path) -> None:
    """Its numbers belong to its tasks."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    own = tmp_path / "own.yaml"
    stated: Changes = {"evaluation.tasks": ("piqa", str(own)), "evaluation.limit": 3, "evaluation.data": str(tmp_path)}
    recipe = changed(load_recipe(folder / "recipe.yaml"), stated | {"evaluation.batch_size": 2})
    (checkpoints / "recipe.yaml").write_text(recipe.frozen(checkpoints))
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    asked: dict[str, Any] = {"num_fewshot": None, "batch_size": None, "data": None}
    with pytest.raises(UserError, match=f"task file {own} in evaluation.tasks, and such files may run code"):
        settings_for(tmp_path, None, limit=None, **asked)
    untrusted = dict(asked)
    asked["trust_recipe"] = True
    assert settings_for(tmp_path, None, limit=None, **asked) == (
        HarnessSettings(("piqa", str(own)), None, 3, 2),
        tmp_path,
    )
    assert settings_for(tmp_path, None, limit=5, **asked)[0].limit == 5
    assert settings_for(tmp_path, ["boolq"], limit=None, **untrusted)[0] == HarnessSettings(("boolq",), batch_size=2)
    exported, data = settings_for(folder / "export", None, limit=None, **untrusted)
    assert "mmlu" in exported.tasks and data is None


def test_the_layout(folder: Path) -> None:
    checkpoints = folder / "run" / "checkpoints"
    assert harness_recipe(checkpoints, []).parallel.tensor_model_parallel_size == 2
    one = harness_recipe(checkpoints, ["parallel.tensor_model_parallel_size=1"])
    assert one.parallel.tensor_model_parallel_size == 1 and not one.parallel.sequence_parallel
