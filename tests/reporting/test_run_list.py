"""txssm runs: the state of each run, and runs that cannot be read."""

import json
import os
import time

import pytest

from megatron_txssm.cli.main import main
from megatron_txssm.holders import is_held
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.reporting import runs
from megatron_txssm.reporting.runs import progress
from megatron_txssm.terminal import compact
from megatron_txssm.training.launch.ended import note_local_end
from megatron_txssm.training.launch.run_lock import RunLock
from tests.jobs.some_attempt import some_attempt
from tests.support.recipes import write_recipe


def a_run(folder, step=0, began=None):
    """A run of 20 steps of 2 s each, up to `step`."""
    write_recipe(folder / "recipe.yaml", {"checkpoint.save_interval": None, "megatron.mock_data": True}, run=folder)
    began = time.time() - 2 * step if began is None else began
    lines = [{"iteration": 0, "start": {}}]
    for n in range(1, step + 1):
        numbers = {"lm loss": 9.0 - n, "grad_norm": 1.0, "tokens_per_second": 1234.5, "time": began + 2 * n}
        lines.append({"iteration": n} | numbers)
    if step:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows(capsys, *words):
    """Name -> the words of its line."""
    assert main(["runs", *words]) == 0
    return {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}


def test_every_state_and_runs_that_are_broken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    top = tmp_path / "runs"
    a_run(top / "new")
    a_run(top / "done", 20)
    note_local_end(a_run(top / "stopped", 5), 130, "told to stop")
    note_local_end(a_run(top / "failed", 5), 1, "rank 0 failed")
    a_run(top / "killed", 5)
    # Its latest start was on Slurm.
    note_local_end(a_run(top / "sweep" / "slurm", 5), 1, "earlier")
    some_attempt(top / "sweep" / "slurm", started=time.time() + 9, cause=Cause.PREEMPTED, ended=time.time() + 10).save()
    (a_run(top / "torn", 5) / "recipe.yaml").write_text("model: [")
    odd = some_attempt(a_run(top / "odd"))
    odd.save()
    (odd.folder / "attempt.json").write_text("3")
    (top / "no_run" / "deep").mkdir(parents=True)
    found = rows(capsys)
    assert {name: words[0] for name, words in found.items() if name != "`txssm"} == {
        "done": "finished",
        "failed": "failed",
        "killed": "failed",
        "new": "not",
        "odd": "broken",
        "stopped": "stopped",
        "sweep/slurm": "stopped",
        "torn": "broken",
    }
    assert found["stopped"][1:4] == ["5/20", "4.000", "1.23k"] and "`txssm" in found
    assert "not valid YAML" in " ".join(found["torn"])


def test_a_running_one_has_the_time_left(tmp_path, capsys):
    run = a_run(tmp_path / "run", 5, began=time.time() + 1e6)
    assert not is_held(run)
    with RunLock(runs.load_run(run)):
        # 15 steps of 2 s: the last one's time lies ahead, so none of it has passed.
        assert rows(capsys, str(run))[str(run)][:5] == ["running", "5/20", "4.000", "1.23k", "0:00:30"]
        copy = run.with_name("copy")
        copy.mkdir()
        (copy / "running.json").write_bytes((run / "running.json").read_bytes())
        assert not is_held(copy), "a copy of the folder is not in use"
        # On another machine the last touch decides.
        fields = json.loads((run / "running.json").read_bytes()) | {"boot": "another"}
        (copy / "running.json").write_text(json.dumps(fields))
        assert is_held(copy)
        os.utime(copy / "running.json", (1e9, 1e9))
        assert not is_held(copy)
    assert not is_held(run)


def test_the_pace_is_the_last_attempts(tmp_path):
    run = a_run(tmp_path / "run", 5, began=0.0)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "start": {}}\n{"iteration": 4, "grad_norm": 1.0, "time": 99.0}\n')
        file.write('{"iteration": 5, "grad_norm": 1.0, "time": 102.0}\n{"iteration": 6, "grad')
    assert progress(run) == (5, None, None, 3.0, 102.0)


def test_a_recipe_beside_the_runs_that_it_made_is_no_run(tmp_path, capsys):
    a_run(tmp_path / "study" / "first", 5)
    checkpoints = a_run(tmp_path / "study" / "second") / "checkpoints"
    for folder in (tmp_path / "study", checkpoints):
        write_recipe(folder / "recipe.yaml", run=folder / "first")
    assert rows(capsys, str(tmp_path)).keys() - {"`txssm"} == {"study/first", "study/second"}


def test_where_there_is_nothing(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0 and "no runs in" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "none")]) == 2 and "is not a folder" in capsys.readouterr().err


def test_a_size_that_takes_too_long_is_a_lower_bound(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 2000)
    assert runs._size(tmp_path, time.monotonic() + 60) == "2kB" and runs._size(tmp_path, 0.0) == ">2kB"


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999.6, "1k"), (1234, "1.23k"), (2e9, "2G"), (5e16, "50P")])
def test_compact_numbers(number, text):
    assert compact(number) == text
