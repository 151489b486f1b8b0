"""Tasks that lm_eval loads and that cannot be asked or scored are refused, by name and with what to do."""

import errno
import io
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from megatron_txssm.errors import UserError
from megatron_txssm.evaluation.harness.language_model import HarnessModel
from megatron_txssm.evaluation.harness.responses import Responses
from megatron_txssm.evaluation.harness.results import print_results
from megatron_txssm.evaluation.harness.tasks import load_tasks
from tests.evaluation.tiny_tasks import write_tasks


@pytest.fixture
def choice(tmp_path: Path) -> Path:
    return write_tasks(tmp_path)["multiple_choice"]


def edited(task: Path, name: str, old: str, new: str) -> str:
    """A copy of a task's file in which `old` is `new`."""
    text = task.read_text()
    assert old in text
    (task.parent / name).write_text(text.replace(old, new))
    return str(task.parent / name)


@pytest.mark.parametrize(
    ("old", "new"), [("metric: acc", "metric: accuraci"), ("aggregation: mean", "aggregation: men")]
)
def test_a_metric_that_nobody_knows(choice: Path, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which lm_eval shows nothing, or fails when all answers are there."""
    # Of the hub, which lm_eval asks for a metric.
    monkeypatch.setitem(sys.modules, "evaluate", None)
    metric = new.removeprefix("metric: ") if "metric" in new else "acc"
    with pytest.raises(UserError, match=f"cannot compute the metric '{metric}' of task tiny_multiple_choice.*correct"):
        load_tasks([edited(choice, "own.yaml", old, new)])


def test_a_metric_of_the_tasks_own_code(choice: Path) -> None:
    (choice.parent / "code.py").write_text("def scores(doc, results):\n    return {'mine': 1.0}\n")
    own = "metric: mine, aggregation: mean, higher_is_better: true}\nprocess_results: !function code.scores\n#"
    assert load_tasks([edited(choice, "own.yaml", "metric: acc", own)]).asked == ["tiny_multiple_choice"]


def test_two_tasks_of_one_name(choice: Path) -> None:
    """lm_eval would ask the second, and show its scores for both."""
    other = edited(choice, "other.yaml", "{{question}}", "Answer: {{question}}")
    with pytest.raises(UserError, match=r"other\.yaml: its task tiny_multiple_choice has the name of another task"):
        load_tasks([str(choice), other])
    assert load_tasks([str(choice), f"{choice.parent}/../{choice.parent.name}/{choice.name}"])


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b'{"question": "\\ud800"}\n', "ArrowInvalid: JSON parse error: The surrogate pair"),
        (None, "FileNotFoundError: Unable to find"),
    ],
)
def test_data_of_a_file_that_cannot_be_read(choice: Path, content: bytes | None, wanted: str) -> None:
    """The message says what is wrong with them, and does not begin with the hub."""
    data = choice.parent / "questions.jsonl"
    data.unlink() if content is None else data.write_bytes(content)
    with pytest.raises(UserError, match=f"{wanted}.*; correct the file and what it names, or, if its data are on the"):
        load_tasks([str(choice)])


def test_a_cache_that_cannot_be_written(choice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = choice.parent / "cache"

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cache / "datasets"))

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(cache))
    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", fail)
    with pytest.raises(
        UserError, match=f"^{cache}/datasets, in which .*Permission denied.* environment variable HF_HOME$"
    ):
        load_tasks([str(choice)])


class Words:
    """A tokenizer and a model with one token for each word, which says nothing."""

    eod, description, max_length = 0, "words", 16

    @property
    def decoder(self) -> "Words":
        return self

    def encode(self, text: str) -> list[int]:
        return [1] * len(text.split())


def asked_model(folder: Path, batch_size: int = 8) -> HarnessModel:
    @contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None

    def share(work: Any, items: list[Any]) -> list[Any]:
        return ["" for _ in items]

    ranks: Any = SimpleNamespace(model=Words(), replicas=1, share=share)
    return HarnessModel(ranks, Responses(folder / "responses.jsonl"), batch_size, bar)


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("mine", 0, 1))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"max_gen_toks": "many"}, "task mine: its generation_kwargs are wrong \\(invalid literal"),
        ({"max_gen_toks": -8}, "task mine: its generation_kwargs have max_gen_toks -8 and until"),
        ({"until": 5}, "until \\[5\\]; they need at least 1 and texts: correct them"),
    ],
)
def test_wrong_options_of_generation(tmp_path: Path, options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        asked_model(tmp_path).generate_until([request("generate_until", "a text", options)])


def test_a_continuation_longer_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"of 17 tokens, and the model reads 1 to 16; leave that task out .*'a text'"):
        asked_model(tmp_path).loglikelihood([request("loglikelihood", "a text", " word" * 17)])


def test_a_batch_of_any_size_takes_no_memory(tmp_path: Path) -> None:
    model = asked_model(tmp_path, batch_size=10**6)
    tracemalloc.start()
    try:
        assert model.generate_until([request("generate_until", "a text", {})]) == [""]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_perplexity_of_thirty_digits_is_shortened() -> None:
    metrics = {"perplexity": {"value": 1.505e27, "stderr": 2.5e26}, "acc": {"value": 0.25, "stderr": 0.125}}
    task = {"metrics": metrics, "num_fewshot": 0, "samples": None}
    shown = io.StringIO()
    counts = {"truncated_requests": 0, "shortened_answers": 0}
    print_results({"shown": ["mine"], "tasks": {"mine": task}, **counts}, shown)
    assert "1.505e+27  2.500e+26" in shown.getvalue() and "   0.2500     0.1250" in shown.getvalue()
