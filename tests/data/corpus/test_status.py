"""How far a corpus is, read from its files: finished, running, failed and lost tasks, and the words of the commands."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.data.corpus.manifest import Plan, Slice, write_plan
from megatron_txssm.data.corpus.status import SILENT_SECONDS, CorpusStatus, SubsetStatus
from megatron_txssm.data.sharding import progress, shard_task
from megatron_txssm.data.sharding.progress import print_status
from megatron_txssm.errors import UserError
from megatron_txssm.files import write_json
from tests.data.in_process import manifest_of, run_tasks_here, shard, web_recipe

# Of the five source files; each is a task.
DOCUMENTS = (1, 2, 3, 4, 10)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished corpus of five tasks."""
    run_tasks_here(monkeypatch)
    source = tmp_path / "source"
    source.mkdir()
    for number, documents in enumerate(DOCUMENTS):
        lines = ['{"text": "some words"}\n'] * documents + ['{"text": null}\n'] * (number == 2)
        (source / f"{number}.jsonl").write_text("".join(lines))
    assert shard(web_recipe(tmp_path, source, task_bytes=1, max_broken_fraction=1)) == 0
    return tmp_path / "corpus"


def say(corpus: Path, task: int, state: str, *, ago: float = 0.0, **facts: Any) -> None:
    """What a running task leaves, `ago` seconds after it last said so; it has no manifest."""
    (corpus / "web" / f"{task:05d}.json").unlink()
    counts = {
        "rows": 100,
        "filtered": 0,
        "broken": 0,
        "documents": 100,
        "tokens": 1000,
        "text_bytes": 10_000,
        "progress": 0.5,
    }
    place = {"host": "node1", "pid": 1, "started": 0.0, "updated": time.time() - ago, "encoder": "gigatoken 1"}
    write_json(corpus / "web" / f"{task:05d}.status.json", counts | place | {"state": state} | facts)


def read(corpus: Path) -> SubsetStatus:
    (status,) = CorpusStatus(corpus).read()
    return status


def shown(corpus: Path, capsys: pytest.CaptureFixture) -> list[str]:
    capsys.readouterr()
    assert main(["data", "status", str(corpus)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_finished_corpus_is_summed_up(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    status = read(corpus)
    records = [manifest_of(corpus, task).shards["train"] for task in range(5)]
    assert status.done and (status.finished, status.running, status.lost, status.failed) == (5, 0, 0, {})
    assert status.progress == pytest.approx(1)
    assert (status.rows, status.documents) == (sum(DOCUMENTS) + 1, sum(DOCUMENTS))
    assert status.tokens == sum(record.tokens for record in records)
    assert status.text_bytes == sum(DOCUMENTS) * len("some words")
    assert status.broken == {"null text": 1}
    lines = shown(corpus, capsys)
    assert lines[0].split() == ["subset", "tasks", "documents", "tokens", "text", "broken", "now"]
    assert lines[1].split() == ["web", "5/5", "20", str(status.tokens), "0.0", "MB", "1", "-"]
    assert "web: 1 × null text; their places are in its tasks' manifests" in lines


def test_a_subset_without_validation_documents_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_tasks_here(monkeypatch)
    source = tmp_path / "source"
    source.mkdir()
    (source / "0.jsonl").write_text("".join(f'{{"text": "words {i}"}}\n' for i in range(40)))
    said = "web: none of its documents is held out for validation"
    for name, fraction, held_out in (("none", 0.0, 0), ("half", 0.5, None)):
        (tmp_path / name).mkdir()
        assert shard(web_recipe(tmp_path / name, source, validation_fraction=fraction)) == 0
        lines = shown(tmp_path / name / "corpus", capsys)
        assert (said in lines) == (held_out == 0), name


def test_tasks_are_finished_running_failed_lost_or_not_begun(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    say(corpus, 1, "running")
    say(corpus, 2, "failed", ago=10_000, error="UserError: the disk is full")
    say(corpus, 3, "running", ago=SILENT_SECONDS + 5)
    (corpus / "web" / "00004.json").unlink()
    status = read(corpus)
    assert not status.done
    assert (status.tasks, status.finished, status.running, status.lost) == (5, 1, 1, 1)
    assert status.failed == {2: "UserError: the disk is full"}
    sizes = [len('{"text": "some words"}\n') * n + len('{"text": null}\n') * (n == 3) for n in DOCUMENTS]
    # What a lost task has read, it will read again.
    assert status.progress == pytest.approx((sizes[0] + sizes[1] / 2) / sum(sizes))
    assert (status.documents, status.text_bytes) == (1 + 100, len("some words") + 10_000)
    lines = shown(corpus, capsys)
    assert lines[1].endswith("1 running, 1 failed, 1 lost") and "1/5" in lines[1]
    assert "web task 2 failed: UserError: the disk is full" in lines


def test_a_task_that_is_silent_for_a_moment_is_not_lost(corpus: Path) -> None:
    say(corpus, 1, "running", ago=SILENT_SECONDS - 5)
    assert (read(corpus).running, read(corpus).lost) == (1, 0)


def test_what_an_earlier_attempt_left_says_nothing_of_a_finished_task(corpus: Path) -> None:
    before = read(corpus)
    content = (corpus / "web" / "00001.json").read_bytes()
    say(corpus, 1, "failed", error="x")
    (corpus / "web" / "00001.json").write_bytes(content)
    assert read(corpus) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_status_that_is_just_being_replaced_is_no_error(corpus: Path, content: bytes) -> None:
    (corpus / "web" / "00001.json").unlink()
    (corpus / "web" / "00001.status.json").write_bytes(content)
    (corpus / "web" / "other.status.json").write_bytes(b"{}")
    status = read(corpus)
    assert (status.finished, status.running, status.failed) == (4, 0, {})


def test_sources_that_do_not_tell_their_sizes_count_alike(tmp_path: Path) -> None:
    write_plan(tmp_path, Plan({"web": tuple((Slice(f"{n}.jsonl", 0, 1, 0),) for n in range(4))}))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "00000.json").touch()
    (tmp_path / "web" / "00001.json").touch()
    say(tmp_path, 0, "running", progress=1.0)
    say(tmp_path, 1, "running", progress=0.5)
    assert read(tmp_path).progress == pytest.approx(1.5 / 4)


def test_a_reader_that_goes_on_sees_new_manifests_and_reads_each_once(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (corpus / "web" / "00003.json").read_bytes()
    (corpus / "web" / "00003.json").unlink()
    status = CorpusStatus(corpus)
    assert status.read()[0].finished == 4
    (corpus / "web" / "00003.json").write_bytes(content)
    assert status.read()[0].finished == 5
    for path in (corpus / "web").glob("0*.json"):
        path.unlink()
    assert status.read()[0].finished == 5


def test_a_running_task_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From within the task itself, at the end of its second portion of documents."""
    run_tasks_here(monkeypatch)
    monkeypatch.setattr(shard_task, "SECONDS_BETWEEN_STATUS", 0)
    monkeypatch.setattr(shard_task, "BATCH_DOCUMENTS", 10)
    source = tmp_path / "source"
    source.mkdir()
    lines = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(50))
    for name in "ab":
        (source / f"{name}.jsonl").write_text(lines)
    seen: list[SubsetStatus] = []
    update = shard_task._Status.update

    def look(self: Any, facts: dict[str, Any]) -> None:
        update(self, facts)
        seen.append(read(tmp_path / "corpus"))

    monkeypatch.setattr(shard_task._Status, "update", look)
    assert shard(web_recipe(tmp_path, source)) == 0
    assert [status.documents for status in seen] == list(range(10, 101, 10))
    assert [status.running for status in seen] == [1] * 10
    assert [round(status.progress, 2) for status in seen] == [0] * 5 + [0.5] * 5
    assert read(tmp_path / "corpus").done and not list((tmp_path / "corpus").rglob("*.status.json"))


def test_the_error_of_a_failed_task_is_shown_until_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_tasks_here(monkeypatch)
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_text('{"text": "one"}\nno JSON\n')
    recipe = web_recipe(tmp_path, source)
    assert shard(recipe) == 2
    lines = shown(tmp_path / "corpus", capsys)
    assert lines[1].endswith("1 failed") and "0/1" in lines[1]
    (failed,) = [line for line in lines if line.startswith("web task 0 failed: ")]
    assert "max_broken_fraction=0.001 is exceeded" in failed
    assert "  a.jsonl, row 1: invalid JSON" in "\n".join(lines)

    assert shard(recipe, "--set", "subsets.web.max_broken_fraction=1") == 0
    assert not any("failed" in line for line in shown(tmp_path / "corpus", capsys))


def test_only_the_first_failures_are_listed(corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "FAILURES_SHOWN", 2)
    for task in (4, 0, 3):
        say(corpus, task, "failed", error=f"error of {task}")
    lines = shown(corpus, capsys)
    assert [line for line in lines if "failed: " in line] == [
        "web task 0 failed: error of 0",
        "web task 3 failed: error of 3",
    ]
    assert lines[1].endswith("3 failed")


def test_follow_ends_with_the_last_task_or_a_failed_one(
    corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (corpus / "web" / "00001.json").read_bytes()
    say(corpus, 1, "running")
    looks: list[float] = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            (corpus / "web" / "00001.json").write_bytes(content)

    monkeypatch.setattr(progress.time, "sleep", wait)
    assert main(["data", "status", str(corpus), "--follow"]) == 0
    assert len(looks) == 3 and "5/5" in capsys.readouterr().out

    say(corpus, 1, "failed", error="the disk is full")
    assert main(["data", "status", str(corpus), "--follow"]) == 0
    assert len(looks) == 3 and "web task 1 failed: the disk is full" in capsys.readouterr().out


def test_what_holds_no_corpus_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="holds no corpus"):
        CorpusStatus(tmp_path)
    for name, message in (
        (str(tmp_path), "holds no corpus"),
        (str(tmp_path / "missing"), "holds no corpus"),
        ("smolm_corpus", "did you mean 'smollm_corpus'?"),
    ):
        assert main(["data", "status", name]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and name in error and message in error


def test_a_recipe_that_is_not_begun_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = web_recipe(tmp_path, tmp_path)
    assert main(["data", "status", str(recipe)]) == 2
    assert (
        f"error: {tmp_path / 'corpus'} holds no corpus (no plan.json); make it: txssm data shard {recipe}\n"
        in capsys.readouterr().err
    )


def test_a_corpus_may_be_named_by_its_recipe(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "status", str(corpus.parent / "recipe.yaml")]) == 0
    assert "5/5" in capsys.readouterr().out


def help_of(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["data", *words, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_shows_examples(capsys: pytest.CaptureFixture) -> None:
    from megatron_txssm.cli.data import COMMANDS

    overview = help_of(capsys)
    for command, (_, summary, examples) in COMMANDS.items():
        assert f"\n  {examples[0]}\n" in overview and command in overview
        text = help_of(capsys, command)
        assert summary[1:] in " ".join(text.split())
        assert text.endswith("\n".join(["examples:", *(f"  {example}" for example in examples)]) + "\n")
        # An example is of the command that it explains.
        assert all(example.startswith(f"txssm data {command} ") for example in examples)


def test_a_misspelt_command_is_a_clear_error(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "shrad", "smollm_corpus"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "'shrad'" in message and "'shard'" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smollm_corpus", "--workers", "0"], "--workers 0 must be at least 1"),
        (["smollm_corpus", "--workers", "-3"], "--workers -3 must be at least 1"),
        (["smollm_corpus", "--set", "subsets.web"], "--set subsets.web: write it as"),
    ],
)
def test_a_mistaken_option_of_shard_is_a_clear_error(
    capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    assert main(["data", "shard", *words]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_a_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    status = SubsetStatus("fineweb-edu-dedup", tasks=1700, finished=1234, running=300, lost=2)
    status.documents, status.tokens, status.text_bytes = 190_168_005, 249_812_345_678, 990_123_456_789
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns, *shown in (
        ("80", "190.2M", "249.8B", "990.1"),
        ("120", "190,168,005", "249,812,345,678", "990,123.5"),
    ):
        monkeypatch.setenv("COLUMNS", columns)
        print_status([status])
        lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
        assert max(map(len, lines)) <= int(columns) and "…" not in "".join(lines)
        words = " ".join(lines).split()
        assert {"fineweb-edu-dedup", "1,234/1,700", *shown, "300", "running,"} <= set(words)
