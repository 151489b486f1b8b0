"""What a run folder holds of its jobs: attempts, steps, and how a run is found."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm import metrics as metrics_file
from megatron_txssm.errors import UserError
from megatron_txssm.jobs.attempts import Attempt, attempts, farthest_step, find_run, load_run, new_attempt
from megatron_txssm.jobs.cause import Cause
from megatron_txssm.jobs.diagnosis.diagnosis import diagnose, recorded
from megatron_txssm.jobs.supervisor.decision import refusal
from megatron_txssm.metrics import current_step, last_step, metrics_lines
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.slurm.submission import read_submission
from megatron_txssm.slurm.words import EndedBySlurm
from tests.jobs.some_attempt import some_attempt
from tests.slurm.some_queue import write_queue


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("demo_cpu", [f"run_directory={tmp_path}/run"])


def write_step(recipe: Recipe, step: int) -> None:
    with (recipe.run_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": step, "lm loss": 3.0, "grad_norm": 1.0}) + "\n")


# --- Attempts.


def test_an_attempt_is_read_as_it_was_saved(tmp_path: Path) -> None:
    # Every field another value than its default.
    texts = {name: f"é\u2028{name}" for name in ("job_id", "output", "detail", "node", "action")}
    whole = ("saved_before", "done_before", "metrics_offset", "output_offset", "exit_code", "last_step", "saved_after")
    numbers = {name: number for number, name in enumerate([*whole, "rank", "nproc_per_node"], 3)}
    fields = {**texts, **numbers, "started": 1.5, "ended": 2.5, "told_to_stop": True, "cause": Cause.KILLED}
    fields |= {"nodes": ["n3"], "failed_nodes": {"n3": ["é"]}}
    fields |= {"hang": {"seconds": 61.5, "silent_ranks": [1], "during": "save"}}
    assert fields.keys() | {"folder"} == {field.name for field in dataclasses.fields(Attempt)}
    attempt = some_attempt(tmp_path, 7, **fields)
    attempt.save()
    (read,) = attempts(tmp_path)
    assert read == attempt
    assert (read.number, read.run) == (7, tmp_path)


def test_the_first_attempt_of_all(recipe: Recipe) -> None:
    attempt = new_attempt(recipe, "21", ["n1", "n2"], 4)
    assert attempt.number == 1
    assert (attempt.saved_before, attempt.done_before, attempt.metrics_offset) == (None, 0, 0)
    assert not attempt.came_further
    assert attempts(recipe.run_path) == [attempt]


def test_the_next_attempt_begins_where_the_run_stands(recipe: Recipe) -> None:
    new_attempt(recipe, "21", ["n1"], 1)
    # It went from 4 back to 2 once.
    for step in (3, 4, 2):
        write_step(recipe, step)
    recipe.checkpoint_path.mkdir()
    (recipe.checkpoint_path / "latest_checkpointed_iteration.txt").write_text("2\n")
    attempt = new_attempt(recipe, "21", ["n1"], 1)
    assert attempt.number == 2
    assert (attempt.saved_before, attempt.done_before) == (2, 4)
    assert attempt.metrics_offset == (recipe.run_path / "metrics.jsonl").stat().st_size
    write_step(recipe, 5)
    assert last_step(recipe.run_path / "metrics.jsonl", attempt.metrics_offset) == 5


def test_numbers_are_not_used_again(recipe: Recipe) -> None:
    for number in (1, 2, 10, 11):
        some_attempt(recipe.run_path, number).save()
    (recipe.run_path / "attempts" / "0010" / "attempt.json").unlink()
    assert [attempt.number for attempt in attempts(recipe.run_path)] == [1, 2, 11]
    assert new_attempt(recipe, "21", ["n1"], 1).number == 12


def test_attempts_are_in_the_order_of_their_numbers(recipe: Recipe) -> None:
    for number in (10000, 9999, 2):
        some_attempt(recipe.run_path, number).save()
    assert [attempt.number for attempt in attempts(recipe.run_path)] == [2, 9999, 10000]


def test_a_folder_set_aside_is_no_attempt(recipe: Recipe) -> None:
    some_attempt(recipe.run_path, 1).save()
    folder = recipe.run_path / "attempts"
    (folder / "0001.kept").mkdir()
    (folder / "0001.kept" / "attempt.json").write_bytes((folder / "0001" / "attempt.json").read_bytes())
    assert [attempt.folder.name for attempt in attempts(recipe.run_path)] == ["0001"]
    assert new_attempt(recipe, "21", ["n1"], 1).number == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"job_id": "21"}', "\x00" * 40])
def test_a_damaged_attempt_is_named(tmp_path: Path, text: str) -> None:
    some_attempt(tmp_path, 1).save()
    path = tmp_path / "attempts" / "0002" / "attempt.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError) as error:
        attempts(tmp_path)
    assert str(error.value).startswith(f"{path}: not readable (")
    assert "remove its folder" in str(error.value)


def test_an_attempt_of_another_version_is_read(tmp_path: Path) -> None:
    attempt = some_attempt(tmp_path, cause="failed", told_to_stop=True)
    attempt.save()
    path = attempt.folder / "attempt.json"
    # A later one writes what this one does not know, an earlier one had less than this one has.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red", "folder": "/elsewhere"}))
    assert attempts(tmp_path) == [attempt]
    path.write_text(json.dumps({"job_id": "21", "nodes": ["n1"], "nproc_per_node": 2, "started": 1000.0}))
    (read,) = attempts(tmp_path)
    assert (read.done_before, read.saved_before, read.cause, read.failed_nodes) == (0, None, None, {})


def test_the_first_versions_attempt_is_read_and_diagnosed(tmp_path: Path) -> None:
    """Its record of a hang did not say what the trainer was doing."""
    folder = tmp_path / "attempts" / "0001"
    folder.mkdir(parents=True)
    fields = {
        "job_id": "21",
        "nodes": ["n1", "n2"],
        "nproc_per_node": 1,
        "started": 1000.0,
        "saved_before": None,
        "done_before": 0,
        "metrics_offset": 0,
        "output": None,
        "output_offset": 0,
        "ended": 2000.0,
        "exit_code": None,
        "told_to_stop": False,
        "hang": {"seconds": 61.0, "silent_ranks": [1]},
        "failed_nodes": {},
        "cause": None,
    }
    (folder / "attempt.json").write_text(json.dumps(fields))
    (read,) = attempts(tmp_path)
    found = diagnose(read, finished=False, output="")
    assert (found.cause, found.rank, found.node) == (Cause.HUNG, 1, "n2")
    assert found.detail.startswith("no step for 61 s; rank 1 did not answer")


def test_a_later_versions_attempt_is_read_and_explained(tmp_path: Path) -> None:
    attempt = some_attempt(tmp_path, cause="meteorite_strike", detail="in Chelyabinsk", node="n1")
    attempt.save()
    path = attempt.folder / "attempt.json"
    hang = {"seconds": 61.0, "silent_ranks": None, "during": "step", "stacks": {"0": "…"}}
    later = {"hang": hang, "impact": {"megatons": 0.4}, "schema": 7}
    path.write_text(json.dumps(json.loads(path.read_text()) | later))
    (read,) = attempts(tmp_path)
    assert (read.cause, read.hang) == ("meteorite_strike", hang)
    found = recorded(read)
    assert found is not None and str(found) == "meteorite strike on n1: in Chelyabinsk"
    assert found.remedy == "read the job's output"
    assert refusal(read, [], 10) == "another attempt would end the same way"


@pytest.mark.parametrize("cause", Cause)
def test_a_cause_is_written_as_its_text_and_read_as_itself(tmp_path: Path, cause: Cause) -> None:
    some_attempt(tmp_path, cause=cause).save()
    text = (tmp_path / "attempts" / "0001" / "attempt.json").read_text()
    assert json.loads(text)["cause"] == cause.name.lower()
    (read,) = attempts(tmp_path)
    assert read.cause is cause


def test_slurms_reasons_are_causes() -> None:
    assert {Cause(reason).name for reason in EndedBySlurm} == {reason.name for reason in EndedBySlurm}


def test_ranks_are_dealt_out_in_blocks(tmp_path: Path) -> None:
    attempt = some_attempt(tmp_path)
    assert [attempt.node_of(rank) for rank in range(4)] == ["n1", "n1", "n2", "n2"]


def test_only_its_own_output_is_read(tmp_path: Path) -> None:
    output = tmp_path / "job.out"
    output.write_bytes(b"before\n\xff\xfeafter\n")
    assert some_attempt(tmp_path, output=str(output), output_offset=7).read_output() == "\ufffd\ufffdafter\n"
    # A job that truncates its file, or has lost it.
    assert some_attempt(tmp_path, output=str(output), output_offset=4711).read_output() == ""
    assert some_attempt(tmp_path, output=str(tmp_path / "gone")).read_output() == ""
    assert some_attempt(tmp_path, output=None).read_output() == ""


def test_of_a_huge_output_the_end_is_read(tmp_path: Path) -> None:
    output = tmp_path / "job.out"
    with output.open("wb") as file:
        file.truncate(50_000_000)
        file.seek(0, os.SEEK_END)
        file.write(b"the end")
    text = some_attempt(tmp_path, output=str(output)).read_output()
    assert text.endswith("the end") and len(text) == 4_000_000


CODE = """\
import sys
from megatron_txssm.jobs.attempts import new_attempt
from megatron_txssm.recipe.loader import load_recipe
new_attempt(load_recipe("demo_cpu", [f"run_directory={sys.argv[1]}"]), "21", ["n1"], 1)
"""


def test_the_output_is_the_file_behind_stdout(recipe: Recipe, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(recipe.run_path)]
    with (tmp_path / "job.out").open("w") as file:
        file.write("of the attempt before\n")
        file.flush()
        subprocess.run(command, stdout=file, check=True)
    subprocess.run(command, stdout=subprocess.PIPE, check=True)
    in_file, in_pipe = attempts(recipe.run_path)
    assert (in_file.output, in_file.output_offset) == (str(tmp_path / "job.out"), 22)
    assert (in_pipe.output, in_pipe.output_offset) == (None, 0)


# --- Steps.


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b'{"iteration": 9, "grad_n',
        b'{"iteration": 9, "grad_norm": 1.0',
        b"\0" * 512,
        b"\xff\xfe\n",
        b"9\n",
        b"null\n",
        b'"grad_norm"\n',
        b'["grad_norm"]\n',
        # A validation's line: no step.
        b'{"iteration": 9, "validation loss": 3.0}\n',
    ],
)
def test_what_a_kill_leaves_at_the_end_is_left_out(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 7, "grad_norm": 1.0}\n{"iteration": 8, "grad_norm": null}\n' + tail)
    assert last_step(path) == 8


def test_steps_behind_a_torn_line_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    # The resumed run appends to what the killed one left.
    path.write_bytes(b'{"iteration": 7, "gr{"iteration": 8, "grad_norm": 1.0}\n{"iteration": 9, "grad_norm": NaN}\n')
    assert last_step(path) == 9


def test_no_step(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert last_step(metrics) is current_step(metrics) is None
    metrics.write_text('{"iteration": 9, "validation loss": 3.0}\n')
    assert last_step(metrics) is current_step(metrics) is None


def test_a_run_that_went_back_is_where_its_last_line_is(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    steps = [*range(1, 1001), *range(801, 901)]
    metrics.write_text("".join(f'{{"iteration": {step}, "grad_norm": 1.0, "x": "{"y" * 90}"}}\n' for step in steps))
    assert metrics.stat().st_size > 65536
    assert (last_step(metrics), current_step(metrics)) == (1000, 900)


def test_a_step_behind_a_torn_begin_is_found_in_the_same_line(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b'{"iteration": 7, "gr{"iteration": 8, "grad_norm": 1.0}\n')
    assert last_step(metrics) == current_step(metrics) == 8


def test_the_farthest_step_is_exact_whatever_the_file_holds(tmp_path: Path) -> None:
    draw = random.Random(20250609)
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(300):
        lines = []
        step = 0
        for _ in range(draw.randrange(60)):
            step = max(0, step + draw.choice([1, 1, 1, 1, -5]))
            line = f'{{"iteration": {step}, "grad_norm": 1.0, "x": "{"y" * draw.randrange(90)}"}}\n'
            kinds = [line, line, line, line[: draw.randrange(len(line))], line.replace("grad_norm", "validation loss")]
            lines.append(draw.choice(kinds))
        metrics.write_text("".join(lines))
        steps = [line["iteration"] for line in metrics_lines(metrics) if "grad_norm" in line]
        assert last_step(metrics) == max(steps, default=None)
        assert current_step(metrics) == (steps[-1] if steps else None)
        size = draw.choice([1, 7, 50, 1000, 100_000])
        blocks = list(metrics_file._blocks_from_the_end(metrics, 0, size))
        assert b"".join(reversed(blocks)) == metrics.read_bytes()
        assert all(block.endswith(b"\n") for block in blocks[1:])


def test_what_an_attempts_record_knows_is_not_read_again(recipe: Recipe) -> None:
    first = new_attempt(recipe, "21", ["n1"], 1)
    for step in range(1, 31):
        write_step(recipe, step)
    second = new_attempt(recipe, "21", ["n1"], 1)
    assert second.done_before == 30 and farthest_step(recipe.run_path / "metrics.jsonl", first) == 30
    for step in range(21, 26):
        write_step(recipe, step)
    metrics = recipe.run_path / "metrics.jsonl"
    assert farthest_step(metrics, second) == 30
    # Bytes before its begin are not looked at.
    metrics.write_bytes(metrics.read_bytes().replace(b'"iteration": 10,', b'"iteration": 99,'))
    assert farthest_step(metrics, second) == 30 and last_step(metrics) == 99
    third = new_attempt(recipe, "21", ["n1"], 1)
    assert third.done_before == 30
    # Somebody begins again in the same folder.
    metrics.unlink()
    assert farthest_step(metrics, third) is None
    write_step(recipe, 1)
    assert farthest_step(metrics, third) == 1 == new_attempt(recipe, "21", ["n1"], 1).done_before


# --- A run's own recipe.


def test_the_recipe_is_that_of_the_folder_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As earlier versions froze it: relative to where it was submitted.
    place = tmp_path / "home" / "runs" / "a"
    place.mkdir(parents=True)
    text = "extends: demo_cpu\nname: a\nrun_directory: runs/a\ncheckpoint: {directory: ckpt}\n"
    (place / "recipe.yaml").write_text(text)
    (place / "submission.json").write_text(json.dumps({"directory": str(tmp_path / "home")}))
    monkeypatch.chdir(tmp_path)
    assert load_run(place).run_path == place
    assert load_run(place).checkpoint_path == tmp_path / "home" / "ckpt"
    monkeypatch.chdir(tmp_path / "home")
    assert load_run(Path("runs/a")).run_path.resolve() == place
    # Copied or moved: it is where it is.
    moved = tmp_path / "moved"
    place.rename(moved)
    assert load_run(moved).run_path == moved
    # A folder of checkpoints keeps the recipe of its run.
    run = load_recipe("demo_cpu", [f"run_directory={tmp_path}/b"])
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "recipe.yaml").write_text(run.frozen(tmp_path / "b" / "checkpoints"))
    assert load_run(tmp_path / "b" / "checkpoints").run_path.resolve() == tmp_path / "b"


# --- Finding a run.


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/a with jobs 17 and 18, runs/b with job 19, runs/by_hand without any; no Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "runs"
    for name, jobs in (("a", {"pretrain": ["17"], "convert": ["18"]}), ("b", {"pretrain": ["19"]})):
        (folder / name).mkdir(parents=True)
        (folder / name / "submission.json").write_text(json.dumps({"jobs": jobs}))
    (folder / "by_hand").mkdir()
    (folder / "by_hand" / "recipe.yaml").touch()
    return folder


@pytest.mark.parametrize(
    ("text", "name"),
    [("runs/a", "a"), ("a", "a"), ("./runs/a/", "a"), ("17", "a"), ("18", "a"), ("19", "b"), ("by_hand", "by_hand")],
)
def test_a_run_by_path_name_or_job(runs: Path, text: str, name: str) -> None:
    assert find_run(text).resolve() == runs / name


def test_a_run_elsewhere_by_its_path(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "recipe.yaml").touch()
    assert find_run(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"


@pytest.mark.parametrize("text", ["c", "runs/c", "a\0b", "x" * 10_000, "../runs", "-1", "²"])
def test_no_run_is_a_clear_message(runs: Path, text: str) -> None:
    with pytest.raises(UserError, match="is not a run"):
        find_run(text)


def test_a_misspelt_run_is_told_the_nearest_or_all(runs: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean 'by_hand'\?"):
        find_run("runs/by_hnad")
    (runs / "other").mkdir()
    (runs / "other" / "recipe.yaml").touch()
    with pytest.raises(UserError, match=r"with this number; runs/ has by_hand, other$"):
        find_run("zzz")


def test_an_unknown_job_is_asked_of_slurm(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no squeue on this machine"):
        find_run("4711")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "submission.json").write_text("{}")
    write_queue(tmp_path, {"job_id": 4711, "command": str(elsewhere / "pretrain.sbatch")})
    # `runs` leaves nothing else on PATH.
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    assert find_run("4711") == elsewhere
    with pytest.raises(UserError, match="is not a run"):
        find_run("4712")


@pytest.mark.parametrize("text", ["{", "", "\xff"])
def test_a_damaged_submission_is_named(runs: Path, text: str) -> None:
    (runs / "a" / "submission.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"submission\.json: not readable"):
        read_submission(runs / "a")


def test_a_run_that_was_not_submitted_has_no_submission(runs: Path) -> None:
    assert read_submission(runs / "by_hand") == {}


def test_two_jobs_that_begin_at_once_have_attempts_of_their_own(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each looks before the other has written its record."""
    monkeypatch.setattr("megatron_txssm.jobs.attempts.attempts", lambda run: [])
    found = [new_attempt(recipe, job, ["n1"], 1).number for job in ("21", "22")]
    assert found == [1, 2]
