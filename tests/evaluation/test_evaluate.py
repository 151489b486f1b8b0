"""txssm eval loss: the loss that the run itself logged, at any layout, and the run as it was."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_txssm.cli.main import main
from megatron_txssm.evaluation import evaluate as evaluate_command
from megatron_txssm.evaluation.evaluate import by_parts, evaluation_recipe
from megatron_txssm.session.arguments import megatron_arguments
from tests.data.corpus_fixture import make_corpus, make_recipe, random_documents
from tests.support.tiny_run import txssm

FIELDS = (
    "training.train_iters=3",
    "training.global_batch_tokens=256",
    "checkpoint.save_interval=3",
    "logging.eval_iters=null",
)
TP2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
DP2 = ("parallel.tensor_model_parallel_size=1",)
FOR_GPUS = ("megatron.attention_backend=flash", "megatron.use_persistent_ckpt_worker=true")
PP2 = (*DP2, "parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_stages=1")


def sets(*fields: str) -> list[str]:
    return [word for field in fields for word in ("--set", field)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps at TP=2, which ends with a validation on two subsets, one of two shards."""
    folder = tmp_path_factory.mktemp("evaluated")
    seeds = {"web": (0, 1), "books": (2,)}
    train, validation = (
        {name: [random_documents(count, seed=first + seed) for seed in own] for name, own in seeds.items()}
        for count, first in ((40, 0), (9, 10))
    )
    recipe = make_recipe(folder, make_corpus(folder / "corpus", train, validation))
    done = txssm("pretrain", str(recipe), *sets(*FIELDS, *TP2))
    assert done.code == 0, done.stdout + done.stderr
    return folder / "run"


def logged_losses(run: Path) -> dict[str, float]:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: last[f"validation-{name} lm loss"] for name in ("web", "books")}


def contents(run: Path) -> dict[str, str]:
    """The hash of every file but those of the evaluation."""
    files = (path for path in run.rglob("*") if path.is_file())
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not (name := str(path.relative_to(run))).startswith("evaluation/")
    }


def evaluated(run: Path, *words: str) -> dict[str, Any]:
    """What validation.json says; the run must stay as it is."""
    before, times = contents(run), (run / "checkpoints").stat().st_mtime_ns
    result = run / "evaluation" / "validation.json"
    result.unlink(missing_ok=True)
    done = txssm("eval", "loss", str(run), *words)
    assert done.code == 0, done.stdout + done.stderr
    assert contents(run) == before and (run / "checkpoints").stat().st_mtime_ns == times
    assert "perplexity" in done.stdout and str(result) in done.stdout
    found = json.loads(result.read_text())
    *_, last = map(json.loads, (run / "evaluation" / "history.jsonl").read_text().splitlines())
    assert {name: last[name] for name in found} == found and last["time"] > 0
    return found


@pytest.mark.slow
# At DP=2 the 21 samples of web are divided unevenly; with a stage on each rank, micro-batches are passed on.
@pytest.mark.parametrize(
    "words",
    [
        [],
        [*sets(*DP2), "--nproc", "2", "--by-position", "4"],
        [*sets(*PP2), "--by-position", "2"],
        sets(*DP2, *FOR_GPUS),
    ],
    ids=["as trained", "DP2", "PP2 and a virtual stage", "without the GPU that trained it"],
)
def test_it_equals_what_the_run_logged(run_folder: Path, words: list[str]) -> None:
    result = evaluated(run_folder, *words)
    assert result["step"] == 3 and result["name"] == "corpus"
    assert result["sets"].keys() == {"web", "books"}
    for name, loss in logged_losses(run_folder).items():
        found = result["sets"][name]
        assert found["loss"] == pytest.approx(loss, abs=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        # Every sample is whole, so each part has as many tokens.
        parts = found.get("by_position", [])
        assert len(parts) == (int(words[-1]) if "--by-position" in words else 0)
        assert not parts or (np.mean(parts) == pytest.approx(loss, abs=1e-6) and len(set(parts)) == len(parts))
    assert {name: found["tokens"] for name, found in result["sets"].items()} == expected_tokens(run_folder)


def test_the_loss_of_each_part_of_the_samples() -> None:
    losses_BL = torch.arange(12.0).view(2, 6)
    mask_BL = torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    assert by_parts(losses_BL, mask_BL, 3).tolist() == [[0 + 1 + 7, 2 + 3 + 8 + 9, 4 + 10 + 11], [3, 4, 3]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by-position", "3"], "--by-position 3 does not divide training.seq_length=32"),
        (["--by-position", "0"], "--by-position 0 does not divide"),
        (
            ["--by-position", "2", *sets(*DP2, "parallel.context_parallel_size=2")],
            "add --set parallel.context_parallel_size=1",
        ),
    ],
)
def test_parts_that_there_are_not(
    run_folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "loss", str(run_folder), *words]) == 2
    assert message in capsys.readouterr().err


def expected_tokens(run: Path) -> dict[str, int]:
    """Whole samples of 32 tokens, whose labels need one more; each shard by itself."""
    from megatron_txssm.data.corpus.manifest import open_corpus

    subsets = open_corpus(run.parent / "corpus").subsets
    return {
        name: sum((record.tokens - 1) // 32 * 32 for _, record in subset.shards("validation"))
        for name, subset in subsets.items()
    }


@pytest.mark.slow
def test_token_files_of_ones_own_are_read_whole_without_weights(run_folder: Path) -> None:
    corpus = run_folder.parent / "corpus"
    web, books = (corpus / f"{name}/00000" for name in ("web", "books"))
    tokenizer = [
        "data.tokenizer_type=SentencePieceTokenizer",
        f"data.tokenizer_model={corpus}/tokenizer/tokenizer.model",
    ]
    blend = f"data.validation=[[0.9, {web}.validation], [0.1, {books}.validation]]"
    result = evaluated(run_folder, *sets("data.corpus=null", f"data.train={web}.train", blend, *tokenizer))
    assert list(result["sets"]) == [f"{web}.validation", f"{books}.validation"]
    books_loss = result["sets"][f"{books}.validation"]["loss"]
    assert books_loss == pytest.approx(logged_losses(run_folder)["books"], abs=1e-6)


@pytest.mark.slow
def test_nothing_of_the_training_is_kept(run_folder: Path) -> None:
    recipe = evaluation_recipe(run_folder, ["megatron.exit_duration_in_mins=1", "run_directory=elsewhere"])
    assert recipe.run_path == run_folder / "evaluation"
    assert recipe.checkpoint.save_interval is None and "--save" not in megatron_arguments(recipe)
    assert recipe.megatron == {"skip_train": True}


@pytest.mark.slow
def test_a_step_is_passed_on(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(evaluate_command, "launch", lambda recipe, nproc, command, port: started.append(command) or 0)
    for verb, options in ((["eval", "loss"], []), (["evaluate"], ["--step", "3"])):
        assert main([*verb, str(run_folder), *options]) == 0
    assert started == [["eval", "loss", str(run_folder)], ["eval", "loss", str(run_folder), "--step", "3"]]
    for step, words in ((None, []), (3, ["--ckpt-step=3"])):
        with monkeypatch.context() as two_workers:
            two_workers.setenv("WORLD_SIZE", "2")
            arguments = evaluate_command.evaluation_arguments(evaluation_recipe(run_folder, []), step)
        assert f"--load={run_folder / 'checkpoints'}" in arguments
        assert [word for word in arguments if word.startswith("--ckpt-step")] == words
    wanted = "has no step 2, which --step 2 names; use --step with one of 3"
    refused(["eval", "loss", str(run_folder), "--step", "2"], wanted, capsys)


@pytest.mark.slow
def test_a_checkpoints_folder_is_no_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        ["eval", "loss", str(run_folder / "checkpoints")], f"name the run's own folder, such as {run_folder}", capsys
    )


@pytest.mark.slow
def test_another_model_is_refused(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        ["eval", "loss", str(run_folder), *sets("model.layer_pattern=M-M-")],
        "layer_pattern: M-*- there, M-M- here",
        capsys,
    )


def test_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["eval", "loss", str(tmp_path)], f"{tmp_path} holds no checkpoint; name a run's folder", capsys)
    assert not list(tmp_path.iterdir())
    (step := tmp_path / "checkpoints" / "iter_0000020").mkdir(parents=True)
    refused(["eval", "loss", str(step)], f"{step} is a single step; name {step.parent}, with --step 20", capsys)


def test_without_validation_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path, make_corpus(tmp_path / "corpus", {"web": [random_documents(5, seed=0)]}))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    recipe.rename(run / "recipe.yaml")
    refused(["eval", "loss", str(run)], f"{run} has no validation data", capsys)
    prefix = tmp_path / "corpus/web/00000.train"
    words = sets(
        "data.corpus=null", f"data.blend={prefix}", "data.split='100,0,0'", "data.tokenizer_type=NullTokenizer"
    )
    refused(["eval", "loss", str(run), *words], "name token files with --set data.train=PREFIX", capsys)
    assert not (run / "evaluation").exists()


def refused(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and one message with this text."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert wanted in captured.err, captured.err
