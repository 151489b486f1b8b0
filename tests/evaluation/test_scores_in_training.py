"""`evaluation.tasks`: scores at validations, by the model in training, which they do not change."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_txssm.architecture.layer_pattern import MODULE
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness import in_training
from megatron_txssm.evaluation.harness.in_training import check_generation
from megatron_txssm.evaluation.harness.results import scores
from megatron_txssm.evaluation.harness.tasks import LoadedTasks
from megatron_txssm.metrics import metrics_lines
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.validation.validate import validate
from tests.data.corpus_fixture import corpus_of, make_corpus, random_documents
from tests.evaluation.test_harness_megatron import evaluate, read
from tests.evaluation.tiny_tasks import write_tasks
from tests.support.megatron_tasks import run_tasks
from tests.support.recipes import write_recipe

TENSOR_PARALLEL: Changes = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
# Prediction depths and isolated documents: what a model does only while it trains.
DIVIDED: dict[str, Changes] = {
    "tensor": TENSOR_PARALLEL | {"model.layer_pattern": f"{MODULE}/*-", "data.isolate_documents": True},
    "pipeline": {
        "model.layer_pattern": "M-*-M-*-",
        "parallel.pipeline_model_parallel_size": 2,
        "parallel.virtual_pipeline_stages": 2,
        "data.isolate_documents": True,
    },
    "context": {"parallel.context_parallel_size": 2},
    # Each replica has half of the experts, and texts of its own; of the last batch, with the 39th choice, one has none.
    "experts": {
        "model.layer_pattern": "ME*E",
        "model.num_experts": 4,
        "model.moe_ffn_hidden_size": 32,
        "parallel.expert_model_parallel_size": 2,
        "evaluation.batch_size": 19,
    },
}


def train(recipe: Path) -> None:
    """A task: a whole run, as a worker of `txssm pretrain` does it."""
    import io

    from megatron_txssm.evaluation.harness.in_training import train_and_score
    from megatron_txssm.training.launch.preflight import make_run_directory

    loaded = load_recipe(recipe)
    make_run_directory(loaded)
    train_and_score(loaded, io.StringIO())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two steps, scored after each, by kind of parallelism; NAME_unscored/ as some of them."""
    made = tmp_path_factory.mktemp("scores")
    documents = {"web": [random_documents(40, seed=0)]}
    corpus = corpus_of(make_corpus(made / "corpus", documents, documents))
    tasks = {kind: str(file) for kind, file in write_tasks(made / "tasks", questions=13).items()}
    common: Changes = {
        "training.train_iters": 2,
        "checkpoint.save_interval": 1,
        "optimizer.learning_rate": 1e-2,
        "model.init_method_std": 0.3,
        "megatron.num_workers": 0,
        "logging.eval_interval": 1,
        "logging.eval_iters": 1,
        "evaluation.num_fewshot": 1,
        # Batches whose longest texts are of several lengths.
        "evaluation.batch_size": 3,
    }
    asked = (tasks["multiple_choice"], tasks["loglikelihood_rolling"])
    scored: Changes = {"evaluation.tasks": asked, "evaluation.interval": 1}
    runs = {f"{name}_unscored": changes for name, changes in DIVIDED.items()}
    runs |= {name: changes | scored for name, changes in DIVIDED.items()}
    runs["data"] = {
        "data.isolate_documents": True,
        "evaluation.tasks": tuple(tasks.values()),
        "evaluation.interval": 2,
    }
    recipes = {
        name: write_recipe(made / f"{name}.yaml", corpus, common, changes, run=made / name)
        for name, changes in runs.items()
    }
    asks = [
        (evaluate, {"run": made / name, "tasks": [*tasks.values()], "output": made / f"{name}_saved", "overrides": ()})
        for name in (*DIVIDED, "data")
    ]
    run_tasks(2, [*((train, {"recipe": recipe}) for recipe in recipes.values()), *asks], made / "ranks")
    return made


def lines_with(run: Path, key: str) -> list[dict[str, Any]]:
    return [line for line in metrics_lines(run / "metrics.jsonl") if key in line]


@pytest.mark.parametrize("name", [*DIVIDED, "data"])
def test_scores_are_those_of_the_checkpoint(folder: Path, name: str) -> None:
    saved, of_checkpoint = read(folder / f"{name}_saved")
    last = lines_with(folder / name, "scores")[-1]
    assert last["iteration"] == 2
    for score, value in last["scores"].items():
        task, _, metric = score.partition("/")
        known = {key.partition(",")[0]: found for key, found in saved["tasks"][task]["metrics"].items()}
        assert value == pytest.approx(known[metric.partition(",")[0]]["value"], abs=1e-5)
    [file] = (folder / name / "evaluation/harness").glob("step_2*/responses.jsonl")
    in_training = {key: answers for line in metrics_lines(file) for key, answers in line.items()}
    assert len(in_training) > 10
    for key, answers in in_training.items():
        if isinstance(answers, str):
            assert answers == of_checkpoint[key]
            continue
        for (loglikelihood, likeliest), (known, known_likeliest) in zip(answers, of_checkpoint[key], strict=True):
            assert loglikelihood == pytest.approx(known, abs=1e-4)
            assert likeliest == known_likeliest


def test_at_every_validation_or_the_interval(folder: Path) -> None:
    assert [line["iteration"] for line in lines_with(folder / "tensor", "scores")] == [1, 2]
    assert [line["iteration"] for line in lines_with(folder / "data", "scores")] == [2]
    assert len(lines_with(folder / "data", "scores")[0]["scores"]) == 3
    history = metrics_lines(folder / "tensor/evaluation/harness/history.jsonl")
    assert [(line["model"]["computed_by"], line["model"]["step"]) for line in history] == [
        ("training", 1),
        ("training", 2),
    ]


@pytest.mark.parametrize("name", DIVIDED)
def test_the_training_is_the_same_bit_for_bit(folder: Path, name: str) -> None:
    scored, unscored = (lines_with(folder / run, "lm loss") for run in (name, f"{name}_unscored"))
    assert len(scored) == 2
    for key in ("lm loss", "grad_norm"):
        assert [line[key] for line in scored] == [line[key] for line in unscored]


@pytest.mark.parametrize("error", [OverflowError("math range error"), UserError("a continuation of 99 tokens")])
def test_what_cannot_be_scored_ends_no_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    said: list[str] = []
    monitor: Any = SimpleNamespace(say=said.append, args=SimpleNamespace(world_size=1))
    recipe = changed(load_recipe(folder / "data.yaml"), {"run_directory": str(tmp_path)})
    listener = in_training.TaskScores(recipe, monitor)
    listener.tasks = LoadedTasks({}, [])

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(in_training, "responses_to", fail)
    assert listener._ask(2, None) == {}
    assert said == [f"warning: iteration 2: evaluation.tasks have no scores ({error})"]


def test_missing_data_are_named_as_in_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("--tasks piqa: its data cannot be loaded; use `txssm eval fetch X --tasks piqa`, with --data")

    monkeypatch.setattr(in_training, "load_for", fail)
    monkeypatch.setattr("megatron.core.utils.unwrap_model", lambda models: models)
    monitor: Any = SimpleNamespace(args=SimpleNamespace(rank=0))
    listener = in_training.TaskScores(load_recipe(folder / "data.yaml"), monitor)
    with pytest.raises(UserError, match=r"^evaluation.tasks piqa: .* X --tasks piqa`, with evaluation.data$"):
        listener.after_setup(None, ([None], None, None))  # pyright: ignore[reportArgumentType]


def test_infinity_is_no_score() -> None:
    values = {"acc,none": {"value": 0.5}, "perplexity,none": {"value": math.inf}}
    assert scores({"shown": ["own"], "tasks": {"own": {"metrics": values}}}) == {"own/acc": 0.5}


@pytest.mark.parametrize(
    "fields",
    [*DIVIDED.values(), {"training.fp8": "hybrid"}, {"model.layer_pattern": f"{MODULE}/*-"}],
    ids=[*DIVIDED, "FP8", "prediction"],
)
def test_a_training_model_that_cannot_generate(fields: Changes, folder: Path) -> None:
    kinds = {"piqa": "multiple_choice", "triviaqa": "generate_until"}
    recipe = load_recipe(folder / "data.yaml")
    check_generation(recipe, kinds)
    check_generation(changed(recipe, fields), {"piqa": "multiple_choice"})
    with pytest.raises(UserError, match="triviaqa generates texts token by token"):
        check_generation(changed(recipe, fields), kinds)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluation.tasks": ()}, "evaluation.tasks=[] names no task"),
        ({"evaluation.tasks": None}, "evaluation.interval=2 needs evaluation.tasks; set it to null"),
        ({"logging.eval_iters": 0}, "logging.eval_iters=0 leaves out; set it to 1 or more"),
        (
            {"evaluation.interval": 3, "logging.eval_interval": 2},
            "evaluation.interval=3 is not a multiple of logging.eval_interval=2",
        ),
        ({"data.tokenizer_type": "NullTokenizer"}, "evaluation.interval needs a tokenizer"),
    ],
)
def test_what_cannot_be_scored(fields: Changes, message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        validate(changed(load_recipe(folder / "data.yaml"), fields))
