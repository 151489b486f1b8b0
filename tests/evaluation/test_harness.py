"""txssm eval harness on a Hugging Face folder: lm_eval's own numbers, in batches of any size, after interruptions."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megatron_txssm.cli.main import main
from megatron_txssm.data.tokenizer.huggingface import export_tokenizer
from megatron_txssm.data.tokenizer.sentencepiece import train_sentencepiece
from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness import ranks
from megatron_txssm.evaluation.harness.suites import BENCHMARKS, OF_TABLE_3
from megatron_txssm.evaluation.harness.tasks import load_tasks, task_manager
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from tests.evaluation.tiny_tasks import write_tasks
from tests.hf.tiny import tiny_model

MAX_LENGTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny hybrid model that was trained on 32 tokens, and its tokenizer."""
    made = tmp_path_factory.mktemp("harness")
    texts = [f"def function_{number}(value): return value + {number}\n" for number in range(50)]
    tokenizer = train_sentencepiece(texts, made / "tokenizer", 300)
    tiny_model(vocab_size=300, max_position_embeddings=MAX_LENGTH, initializer_range=0.3).save_pretrained(
        made / "model"
    )
    export_tokenizer(TokenizerSource(type="SentencePieceTokenizer", model=str(tokenizer)), made / "model", texts[0])
    return made / "model"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(file) for file in write_tasks(tmp_path_factory.mktemp("tasks")).values()]


def evaluated(model: Path, tasks: Sequence[str], output: Path, *words: str) -> dict[str, Any]:
    """The only results in `output`."""
    assert main(["eval", "harness", str(model), "--output", str(output), *words, "--tasks", *tasks]) == 0
    [file] = output.glob("*/results.json")
    return json.loads(file.read_text())


def responses(output: Path) -> dict[str, Any]:
    [file] = output.glob("*/responses.jsonl")
    return {key: value for line in file.read_text().splitlines() for key, value in json.loads(line).items()}


def scores(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{name}: {metric}": found["value"]
        for name, task in results["tasks"].items()
        for metric, found in task["metrics"].items()
    }


@pytest.fixture(scope="module")
def results(model: Path, tasks: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("output")
    return evaluated(model, tasks, output, "--num-fewshot", "1"), output


def test_the_numbers_are_those_of_lm_evals_own_model(
    model: Path, tasks: list[str], results: tuple[dict[str, Any], Path]
) -> None:
    """Some requests are longer than the model's 32 tokens."""
    # Its decorator hides the constructor's parameters.
    own: Any = HFLM
    theirs: Any = simple_evaluate(
        own(pretrained=str(model), batch_size=1, dtype="float32", device="cpu"),
        tasks=list(tasks),
        num_fewshot=1,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    for name, task in results[0]["tasks"].items():
        assert results[0]["truncated_requests"] > 0
        for metric, found in task["metrics"].items():
            assert found["value"] == pytest.approx(theirs["results"][name][metric], abs=1e-6), (name, metric)
    ours = responses(results[1]).values()
    likelihoods = [
        value for name in theirs["samples"] for sample in theirs["samples"][name] for [value] in sample["resps"]
    ]
    pairs = [tuple(value) for value in likelihoods if isinstance(value, tuple | list)]
    found = sorted(pair[0] for value in ours if isinstance(value, list) for pair in value)
    assert len(pairs) == 36
    for loglikelihood, _ in pairs:
        assert min(abs(loglikelihood - own) for own in found) < 1e-4


def test_a_batchs_padding_changes_nothing(
    model: Path, tasks: list[str], results: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    alone = evaluated(model, tasks, tmp_path, "--batch-size", "1", "--num-fewshot", "1")
    assert scores(alone) == pytest.approx(scores(results[0]), abs=1e-6)
    one, eight = responses(tmp_path), responses(results[1])
    assert one.keys() == eight.keys()
    for key, value in one.items():
        if isinstance(value, str):
            assert value == eight[key]
        else:
            ours, others = torch.tensor(value), torch.tensor(eight[key])
            torch.testing.assert_close(ours, others, atol=1e-4, rtol=0)


def test_a_killed_evaluation_goes_on_to_the_same_bits(
    model: Path,
    tasks: list[str],
    results: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[int] = []
    answer = ranks.answer

    def interrupted(*arguments: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(ranks, "answer", interrupted)
    words = ["eval", "harness", str(model), "--output", str(tmp_path), "--num-fewshot", "1", "--tasks", *tasks]
    assert main(words) == 130
    assert len(responses(tmp_path)) == 16
    again = evaluated(model, tasks, tmp_path, "--num-fewshot", "1")
    assert scores(again) == scores(results[0])
    assert responses(tmp_path) == responses(results[1])
    batches = sum("[" in line for line in next(iter(results[1].glob("*/responses.jsonl"))).read_text().splitlines())
    assert len(asked) == batches + 1, "each batch once, and the interrupted one again"


def test_results_tell_where_they_come_from(results: tuple[dict[str, Any], Path], model: Path) -> None:
    found, output = results
    assert found["model"]["computed_by"] == "huggingface" and found["model"]["description"] == str(model)
    assert found["model"]["versions"]["lm_eval"].startswith("0.4.")
    assert found["settings"] | {"tasks": []} == {
        "tasks": [],
        "num_fewshot": 1,
        "limit": None,
        "batch_size": 8,
        "fewshot_seed": 1234,
        "replicas": 1,
    }
    choice = found["tasks"]["tiny_multiple_choice"]
    assert choice["version"] == 2.5 and choice["num_fewshot"] == 1 and len(choice["sha256"]) == 64
    assert choice["samples"] == {"original": 12, "effective": 12}
    [line] = (output / "history.jsonl").read_text().splitlines()
    assert json.loads(line) == found


def test_the_suite_is_known_to_lm_eval() -> None:
    """Each of its tasks is in the folder of lm_eval that the table states."""
    manager = task_manager(list(BENCHMARKS))
    assert set(BENCHMARKS) <= set(manager.all_tasks)
    assert len(manager.all_tasks) < 300
    assert set(OF_TABLE_3) <= set(BENCHMARKS)


def test_examples_in_a_prompt(tasks: list[str]) -> None:
    for number, wanted in ((None, 0), (3, 3)):
        loaded = load_tasks(tasks[:1], number)
        assert loaded.tasks["tasks"]["tiny_multiple_choice"].get_config("num_fewshot") == wanted
        assert loaded.asked == ["tiny_multiple_choice"]


@pytest.mark.parametrize(
    "text", ["", "task: [", "task: x\nunknown: 1\ndataset_path: json\n", "task: x\ndoc_to_text: !function code.text\n"]
)
def test_a_task_file_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit(3)")
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"^--tasks .*/own.yaml: lm_eval cannot use this file \([A-Z]\w+: .*\); mend it$"
    ):
        load_tasks([str(tmp_path / "own.yaml")])


def test_one_process_at_a_time(
    model: Path, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "harness", str(model), "--output", str(tmp_path), "--tasks", tasks[0]]
    codes: list[int] = []

    def meanwhile(*arguments: Any) -> Any:
        if not codes:
            codes.append(main(words))
        return answer(*arguments)

    answer = ranks.answer
    monkeypatch.setattr(ranks, "answer", meanwhile)
    assert main(words) == 0 and codes == [2]
    assert f"another process writes into {tmp_path}/huggingface-" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["results.json", "history.jsonl"])
def test_results_that_cannot_be_written(
    model: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The responses are kept: with room, the same command takes them."""
    words = ["eval", "harness", str(model), "--output", str(tmp_path), "--tasks", tasks[0]]
    assert main(words) == 0
    [results] = tmp_path.glob("*/results.json")
    in_the_way = results if name == results.name else tmp_path / name
    in_the_way.unlink()
    in_the_way.mkdir()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{in_the_way} cannot be written: Is a directory; make room" in error
    in_the_way.rmdir()
    assert main(words) == 0 and in_the_way.is_file()


def test_more_examples_than_there_are(
    model: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "harness", str(model), "--output", str(tmp_path), "--tasks", tasks[0], "--num-fewshot"]
    assert main([*words, "13"]) == 2
    assert capsys.readouterr().err.endswith("error: --num-fewshot 13 is more examples than a task has; state fewer\n")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--tasks", "none.yaml"], "--tasks none.yaml: no such file"),
        (["--tasks", ""], "--tasks names no task; use a suite"),
        (["--batch-size", "0"], "--batch-size 0 must be from 1 to 1,000,000,000"),
        (["--limit", f"{10**30}"], f"--limit {10**30} must be from 1 to 1,000,000,000"),
        (["--num-fewshot", "-1"], "--num-fewshot -1 must be from 0 to 1,000,000,000"),
        (["--step", "3"], "is a Hugging Face model; --step, --set, --nproc and --port are for checkpoints"),
        (["--dry-run", "--tasks", "none.yaml"], "--dry-run is for a Slurm job; add --submit, or leave it out"),
        (["--gpus-per-node", "8", "--tasks", "none.yaml"], "--gpus-per-node is for a Slurm job; add --submit"),
        (["--sbatch", "exclusive", "--tasks", "none.yaml"], "--sbatch is for a Slurm job; add --submit"),
        (["--data", "nowhere"], "--data nowhere: no such folder; `txssm eval fetch nowhere --tasks"),
        (["--tasks", "ruler"], "RULER's texts have 4,096 tokens and more, the model's at most 32"),
    ],
)
def test_a_wrong_option(model: Path, capsys: pytest.CaptureFixture[str], words: list[str], wanted: str) -> None:
    assert main(["eval", "harness", str(model), *words]) == 2
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1


def test_a_model_without_a_length(
    model: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another class: ours checks its configuration itself."""
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": -5}
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main(["eval", "harness", str(tmp_path / "model"), "--tasks", tasks[0]]) == 2
    assert "config.json has no max_position_embeddings above 0; state the length" in capsys.readouterr().err
