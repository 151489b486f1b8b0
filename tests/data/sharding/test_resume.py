"""Whatever ends a run, the same command finishes it, and the bytes are those of a run that nothing disturbed."""

import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_txssm.data.corpus.manifest import read_plan
from tests.data.corpora import SmolLMSources, make_smollm_corpus
from tests.data.corpus_recipes import (
    corpus_bytes,
    run_data,
    shard_command,
    smollm_recipe,
    write_byte_level_bpe,
)

KILLS = 15


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> SmolLMSources:
    return make_smollm_corpus(tmp_path_factory.mktemp("sources") / "smollm")


def start(recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        shard_command(recipe, "--workers", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=300)
    assert not alive, "a worker outlives the killed run"


def kill_at_random(process: subprocess.Popen[str], draw: random.Random) -> None:
    """SIGKILL the command alone, or with all its processes, or one of its workers, or press Ctrl-C."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    kind = draw.choice(("main", "all", "worker", "interrupt"))
    if kind == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
    else:
        for victim in {"main": family[:1], "all": family, "worker": family[-1:]}[kind]:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
    process.communicate(timeout=600)
    wait_until_gone(family)


def finished_tasks(corpus: Path) -> list[Path]:
    return [path for path in corpus.glob("*/[0-9]*.json") if path.name.count(".") == 1]


def wait_for_a_random_moment(process: subprocess.Popen[str], corpus: Path, tasks: int, draw: random.Random) -> None:
    """Until some of the unfinished tasks are finished, and a little longer; now and then before any task begins."""
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 0.8))
        return
    before = len(finished_tasks(corpus))
    wanted = draw.randrange(before, max(tasks - 2, before + 1))
    while len(finished_tasks(corpus)) < wanted and process.poll() is None:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.03))


@pytest.mark.slow
def test_kills_change_no_byte(tmp_path: Path) -> None:
    sources = make_smollm_corpus(tmp_path / "smollm", documents_per_subset=30)
    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path), task_bytes=5000)
    assert run_data("shard", str(recipe), "--workers", "2").returncode == 0
    corpus = tmp_path / "corpus"
    expected = corpus_bytes(corpus)
    corpus.rename(tmp_path / "expected")

    tasks = sum(map(len, read_plan(tmp_path / "expected").tasks.values()))
    assert tasks > 10
    draw = random.Random(0)
    cut_short = 0
    # A kill after the end tests nothing, and does not count.
    while cut_short < KILLS:
        process = start(recipe)
        wait_for_a_random_moment(process, corpus, tasks, draw)
        cut_short += process.poll() is None
        kill_at_random(process, draw)
        # What has its manifest has its final bytes already.
        for manifest in finished_tasks(corpus):
            assert manifest.read_bytes() == expected[manifest.relative_to(corpus).as_posix()]
        if len(finished_tasks(corpus)) >= tasks - 2 or draw.random() < 0.2:
            finish_and_compare(recipe, corpus, expected)
    finish_and_compare(recipe, corpus, expected)


def test_what_a_kill_leaves_of_finished_tasks_is_tidied_up(sources: SmolLMSources, tmp_path: Path) -> None:
    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path), max_files=1)
    assert run_data("shard", str(recipe)).returncode == 0
    expected = corpus_bytes(tmp_path / "corpus")
    subset = tmp_path / "corpus" / "cosmopedia-v2"
    gone = subprocess.Popen(["true"])
    gone.wait()
    abandoned = f"{socket.gethostname()}.{gone.pid}.partial"
    for name in ("00000.lock", "00000.status.json", "00000.validation.bin.partial", f"manifest.json.{abandoned}"):
        (subset / name).write_text("{}")
    (tmp_path / "corpus" / f"plan.json.{abandoned}").write_text("{}")
    alive = tmp_path / "corpus" / f"plan.json.{socket.gethostname()}.{os.getpid()}.partial"
    alive.write_text("another command is writing this")
    (subset / "manifest.json").unlink()
    done = run_data("shard", str(recipe))
    assert done.returncode == 0 and "are already finished" in done.stdout
    alive.unlink()
    assert corpus_bytes(tmp_path / "corpus") == expected


def finish_and_compare(recipe: Path, corpus: Path, expected: dict[str, bytes]) -> None:
    """Run to the end, compare, and make room for a run from the beginning."""
    done = run_data("shard", str(recipe), "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    found = corpus_bytes(corpus)
    assert found.keys() == expected.keys()
    assert found == expected
    shutil.rmtree(corpus)


def test_ctrl_c_is_no_error_and_says_how_to_go_on(sources: SmolLMSources, tmp_path: Path) -> None:
    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path), task_bytes=1000)
    process = start(recipe)
    while not list((tmp_path / "corpus").glob("*/00000.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130, output
    assert "tasks are finished, and the same command resumes" in output and "Traceback" not in output


def test_a_killed_worker_ends_the_run_with_a_word(sources: SmolLMSources, tmp_path: Path) -> None:
    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path), task_bytes=1000)
    process = start(recipe)
    while not list((tmp_path / "corpus").glob("*/00000.json")) and process.poll() is None:
        time.sleep(0.01)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "fork" in " ".join(p.cmdline())]
    workers[-1].kill()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert output.count("error:") == 1 and "a worker was killed, perhaps out of memory" in output


def test_a_task_is_not_run_twice_at_a_time(sources: SmolLMSources, tmp_path: Path) -> None:
    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path))
    (tmp_path / "corpus" / "cosmopedia-v2").mkdir(parents=True)
    with (tmp_path / "corpus" / "cosmopedia-v2" / "00000.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        done = run_data("shard", str(recipe))
    assert done.returncode == 2
    assert "cosmopedia-v2 task 0" in done.stderr and "is being run by another process" in done.stderr


def test_another_recipe_does_not_mix_with_what_is_there(sources: SmolLMSources, tmp_path: Path) -> None:
    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path), max_files=1)
    assert run_data("shard", str(recipe)).returncode == 0
    done = run_data("shard", str(recipe), "--set", "subsets.python-edu.limit=3")
    assert done.returncode == 2
    assert (
        "subsets.python-edu.limit: None there, 3 here); only new subsets may be added: use another output"
        in done.stderr
    )


@pytest.mark.parametrize(("kilobytes", "what"), [(20, "tokenizer.json"), (100, "cosmopedia-v2 task 0")])
def test_a_full_disk_is_named_and_leaves_no_final_file(
    sources: SmolLMSources, tmp_path: Path, kilobytes: int, what: str
) -> None:
    recipe = smollm_recipe(tmp_path, sources, write_byte_level_bpe(tmp_path), task_bytes=10**9)
    # A file may not grow beyond this: the system fails the write, as on a full disk.
    limited = ["prlimit", f"--fsize={kilobytes}000", *shard_command(recipe, "--workers", "1")]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "free disk space" in done.stderr and what in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("corpus/*/*.bin"))
    assert run_data("shard", str(recipe)).returncode == 0
