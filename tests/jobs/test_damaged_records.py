"""Damaged files of a run folder: named, or passed over where nothing depends on them; never a traceback."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.recipe.loader import load_recipe
from tests.jobs.some_attempt import some_attempt
from tests.slurm.some_queue import write_queue

COMMANDS = {
    "why": ["why", "a"],
    "jobs --goodput": ["jobs", "--goodput"],
    "logs": ["logs", "a"],
    "runs": ["runs"],
    "cancel": ["cancel", "a"],
}
# What a value may have become.
VALUES = [None, "\0", -1, 10**400, 1e300, float("nan"), [None], {"a": 1}]
NO_JSON = [b"", b"\xff\xfe{}", b"[" * 200_000, b"null", b"3"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of job 21 that has ended in its second attempt; its job is not in the queue."""
    commands = tmp_path / "bin"
    commands.mkdir()
    write_queue(commands)
    for name in ("sinfo", "scancel"):
        (commands / name).write_text("#!/bin/bash\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.defpath}")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "a"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "pretrain-21.out").write_text("END\n")
    (run / "recipe.yaml").write_text(load_recipe("demo_cpu", [f"run_directory={run}"]).frozen(run))
    (run / "submission.json").write_text(json.dumps({"command": "txssm", "jobs": {"pretrain": ["21"]}}))
    now = time.time()
    for number in (1, 2):
        some_attempt(run, number, started=now - 100, ended=now, cause="connection_lost", last_step=11).save()
    (run / "metrics.jsonl").write_text('{"iteration": 11, "grad_norm": 1.0, "time": 1.0}\n')
    return run


@pytest.fixture
def answers(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, tuple[int, str]]]:
    """Command -> its exit code, and all that it prints. Any other exception than a user's error is the test's."""

    def ask() -> dict[str, tuple[int, str]]:
        found = {}
        for name, words in COMMANDS.items():
            code = main(words)
            captured = capsys.readouterr()
            found[name] = (code, captured.out + captured.err)
            assert code in (0, 2), found[name]
        return found

    return ask


def test_a_sound_run(answers: Callable[[], dict[str, tuple[int, str]]]) -> None:
    assert {code for code, _ in answers().values()} == {0}


@pytest.mark.parametrize("name", ["job_id", "nodes", "nproc_per_node", "started", "ended", "metrics_offset", "output"])
def test_a_value_in_an_attempt(run: Path, name: str, answers: Callable[[], dict[str, tuple[int, str]]]) -> None:
    path = run / "attempts" / "0002" / "attempt.json"
    sound = json.loads(path.read_text())
    for value in VALUES:
        path.write_text(json.dumps(sound | {name: value}))
        found = answers()
        fits = (name in ("ended", "output") and value is None) or (name in ("job_id", "output") and type(value) is str)
        assert fits or all(
            str(path) in found[each][1].replace("runs/a", str(run)) for each in ("why", "jobs --goodput")
        )


@pytest.mark.parametrize("file", ["attempts/0002/attempt.json", "submission.json"])
@pytest.mark.parametrize("content", NO_JSON)
def test_what_is_no_record_is_named(
    run: Path, file: str, content: bytes, answers: Callable[[], dict[str, tuple[int, str]]]
) -> None:
    (run / file).write_bytes(content)
    code, said = answers()["why"]
    assert code == 2 and f"{file}" in said and "to continue without it" in said


@pytest.mark.parametrize(
    "fields",
    [
        *({"jobs": value} for value in (3, [], {"pretrain": 3}, {"pretrain": []}, {"pretrain": [None]})),
        *({name: 3} for name in ("command", "directory", "submitted", "code", "overrides")),
    ],
)
def test_a_value_in_a_submission(
    run: Path, fields: dict[str, Any], answers: Callable[[], dict[str, tuple[int, str]]]
) -> None:
    (run / "submission.json").write_text(json.dumps(fields))
    found = answers()
    assert all(found[name][0] == 2 for name in ("why", "logs", "cancel")), found
    assert "submission.json is not what txssm submit writes" in found["why"][1]


@pytest.mark.parametrize("file", ["metrics.jsonl", "ended.json", "running.json", "spikes.jsonl", "conversions.jsonl"])
@pytest.mark.parametrize("content", [*NO_JSON, None])
def test_other_files_are_passed_over(
    run: Path, file: str, content: bytes | None, answers: Callable[[], dict[str, tuple[int, str]]]
) -> None:
    (run / file).unlink(missing_ok=True)
    if content is None:
        (run / file).mkdir()
    else:
        (run / file).write_bytes(content)
        os.utime(run / file, (1, 1))
    assert {code for code, _ in answers().values()} == {0}
