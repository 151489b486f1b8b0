"""txssm check parity as a user runs it: what it says of right layouts, of broken ones, and of mistakes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_txssm.check import runs
from megatron_txssm.cli.main import main

REPOSITORY = Path(__file__).parents[2]


def test_layouts_of_a_recipe_equal_one_process(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nproc", "2", "--layout", "recipe", "--layout", "dp2_zero1_overlap", "--layout", "pp2_vpp2"]
    assert main(["check", "parity", "demo_cpu", *words]) == 0
    said = capsys.readouterr().out
    assert "16 layers (M-M-M-M-M-M-M-*-)" in said and "2 steps, fp64" in said
    for name in ("recipe", "dp2_zero1_overlap", "pp2_vpp2"):
        assert any(line.split()[:3:2] == [name, "same"] for line in said.splitlines() if line), said
    assert said.endswith("the same as one process: all 3 layouts\n")
    assert list(temporary.iterdir()) == []


def test_layers_that_are_no_blocks_in_uneven_stages(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = (
        "model.layer_pattern=MM-*-|M-*",
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=2",
    )
    words = ["--nproc", "2", "--layout", "recipe", "--layout", "tp2_sp"]
    words += [word for change in changes for word in ("--set", change)]
    assert main(["check", "parity", "demo_cpu", *words]) == 0
    said = capsys.readouterr().out
    assert "8 layers (MM-*-M-*)" in said
    assert said.endswith("the same as one process: all 2 layouts\n")


def test_a_broken_layout_is_caught(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "WORKER", "tests.check.broken_worker")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    layouts = ["recompute_full", "recompute_selective", "tp2", "tp2_sp"]
    words = [word for name in layouts for word in ("--layout", name)]
    assert main(["check", "parity", "demo_cpu", "--nproc", "2", "--steps", "1", *words]) == 3
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert rows["tp2"].split()[2] == "same"
    # Each rank has summed over its half of the tokens.
    assert "DIFFERENT" in rows["tp2_sp"] and "norm" in rows["tp2_sp"]
    logs = list(temporary.iterdir())
    assert len(logs) == 2 and all("recomputed in vain" in log.read_text() for log in logs)
    for name in ("recompute_full", "recompute_selective"):
        assert f"{name}: rank 0 failed: RuntimeError: recomputed in vain (log: {temporary}/" in said
    assert said.endswith("NOT the same as one process: recompute_full, recompute_selective, tp2_sp\n")


def test_a_few_random_configurations(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "parity", "transxssm_320m", "--nproc", "2", "--fuzz", "8", "--seed", "5"]) == 0
    assert "8 of 8 the same as one process" in capsys.readouterr().out
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_what_a_signal_ends(temporary: Path, number: int) -> None:
    command = [sys.executable, "-m", "megatron_txssm.cli", "check", "parity", "demo_cpu", "--nproc", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 600
    while len(family) < 2:  # torchrun's agent and a worker
        assert process.poll() is None and time.monotonic() < deadline
        family = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    # A zombie is the init process's to collect.
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--nproc", "0"], "--nproc 0 must be at least 1"),
        (["--fuzz", "0"], "--fuzz 0 must be at least 1"),
        (["--fuzz", "3", "--layout", "tp2"], "leave --layout out"),
        (
            ["--layout", "tp2_ps"],
            "--layout tp2_ps: no layout of up to 4 processes has this name; did you mean 'tp2_sp'",
        ),
        (
            ["--layout", "tp4"],
            "--layout tp4: state_num_groups=2 is not divisible by tensor_model_parallel_size=4; use one of 1, 2",
        ),
        (
            ["--nproc", "1", "--layout", "recipe"],
            "--layout recipe: 1 process cannot be divided into tensor_model_parallel_size=2",
        ),
    ],
)
def test_mistakes(words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "parity", "demo_cpu", *words]) == 2
    assert wanted in capsys.readouterr().err
