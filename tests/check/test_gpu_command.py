"""txssm check gpu: its logic, whole, on this machine's CPU; what it says of wrong results and of what breaks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from megatron_txssm.check.gpu import check, children, parts, speed, trainings, variants
from megatron_txssm.check.gpu.bench import Bench
from megatron_txssm.check.gpu.findings import Finding, compared
from megatron_txssm.check.gpu.parts import PARTS, Part
from megatron_txssm.check.gpu.speed import PAIRS
from megatron_txssm.check.gpu.trainings import STEPS, Agreement, Training
from megatron_txssm.cli.check import GPU_PARTS
from megatron_txssm.cli.main import main
from megatron_txssm.recipe.validation.validate import validate

# Nothing is left out for want of time.
ON_CPU = ["check", "gpu", "--device", "cpu", "--small", "--budget", "3000"]


@pytest.fixture
def out(tmp_path: Path, temporary: Path) -> list[str]:
    return ["--out", str(tmp_path / "found.json")]


@pytest.mark.slow
def test_all_of_it_on_a_cpu(
    tmp_path: Path, out: list[str], temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ON_CPU, *out]) == 0
    said = capsys.readouterr().out
    assert re.search(r"nothing wrong was found; \d+ left out\n$", said), said
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == list(GPU_PARTS)
    verdicts = {finding["claim"]: finding["verdict"] for part in found.values() for finding in part["findings"]}
    right = {claim for claim, verdict in verdicts.items() if verdict == "right"}
    assert {"scan, bf16, against fp64", "stopped and resumed, deterministic: bit for bit"} <= right
    assert verdicts["FP8 in GEMMs, against bf16"] == "left out"
    [pair] = found["speed"]["findings"]
    assert pair["data"]["ours"]["tokens_per_second"] > 0
    # All other files are gone.
    assert [file.name for file in temporary.iterdir()] == ["found.json"]


def test_the_parts_of_the_help_are_those_that_there_are() -> None:
    assert tuple(part.name for part in PARTS) == GPU_PARTS


SMALL = [training for table in (trainings, variants) for wave in table.WAVES for training in wave]


@pytest.mark.parametrize("table", [trainings, variants])
def test_what_is_compared_is_trained(table: ModuleType) -> None:
    names = {training.name for wave in table.WAVES for training in wave}
    for agreement in table.AGREEMENTS:
        assert {agreement.training, agreement.reference} <= names


@pytest.mark.parametrize("training", [*SMALL, *(t for p in PAIRS for t in p.trainings)], ids=lambda t: t.name)
def test_each_training_is_a_valid_recipe(training: Training, tmp_path: Path) -> None:
    validate(training.changed_recipe(tmp_path, tmp_path / "tokens"), world_size=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda"], "no GPU is visible here; run it on a GPU node, or try the check itself: --device cpu"),
        (
            ["--device", "cpu", "--only", "kernels,spead"],
            "--only spead: no such part; use some of environment,",
        ),
        (["--device", "cpu", "--budget", "0"], "--budget 0 must be at least 1"),
        (["--device", "cpu", "--out", "/nowhere/found.json"], "--out /nowhere/found.json: no file can be made there"),
    ],
)
def test_mistakes(words: list[str], message: str, out: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "gpu", *out, *words]) == 2
    assert message in capsys.readouterr().err


def play(monkeypatch: pytest.MonkeyPatch, *played: Part) -> None:
    monkeypatch.setattr(check, "PARTS", played)


def broken(bench: Bench) -> Iterator[Finding]:
    yield compared("a sum", 0.5, 0.1)
    raise RuntimeError("the driver is gone")


def sound(bench: Bench) -> Iterator[Finding]:
    yield compared("a product", 0.0, 0.0)


def test_a_part_that_breaks_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    play(monkeypatch, Part("one", "sums", 1, broken), Part("two", "products", 1, sound))
    assert main([*ON_CPU, *out]) == 3
    said = capsys.readouterr().out
    assert "NOT correct: a sum; sums" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert [finding["verdict"] for finding in found["one"]["findings"]] == ["WRONG", "FAILED"]
    assert found["one"]["findings"][1]["said"] == "RuntimeError: the driver is gone"
    assert [finding["verdict"] for finding in found["two"]["findings"]] == ["right"]


def test_what_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, out: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    play(monkeypatch, Part("one", "sums", 10_000, broken), Part("two", "products", 1, sound))
    assert main([*ON_CPU, *out]) == 0
    assert "left out" in capsys.readouterr().out


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    play(monkeypatch, Part("one", "products", 1, sound))
    assert main([*ON_CPU, "--out", "/dev/full"]) == 2
    said = capsys.readouterr()
    assert "a product" in said.out and "--out /dev/full cannot be written: No space left on device" in said.err


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 0.2])
def test_wrong_is_what_is_not_within_the_bound(error: float) -> None:
    assert compared("x", error, 0.1).verdict == "WRONG"
    assert compared("x", 0.1, 0.1).verdict == "right"


def rows(*losses: float, steps: list[int] | None = None) -> dict[str, Any]:
    """As metrics.jsonl has them, of all steps: the last losses are the given ones."""
    losses = (4.0,) * (STEPS - len(losses)) + losses
    return {"rows": [{"iteration": n, "lm loss": x} for n, x in zip(steps or range(1, 99), losses, strict=False)]}


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (rows(3.0, 2.0), rows(3.0, 2.01), "right"),
        (rows(3.0, 2.0), rows(3.0, 2.2), "WRONG"),
        (rows(3.0, float("nan")), rows(3.0, 2.0), "WRONG"),
        (rows(float("nan"), 2.0), rows(3.0, 2.0), "WRONG"),
        # It ended early, began anew, or there is nothing.
        (rows(3.0, steps=[1, 2, 3]), rows(3.0), "FAILED"),
        ({"rows": [*rows()["rows"][:5], *rows()["rows"]]}, rows(), "FAILED"),
        ({"rows": []}, {"rows": []}, "FAILED"),
        ({"error": "killed"}, rows(3.0), "FAILED"),
        ({"refused": "no FP8 here"}, rows(3.0), "left out"),
    ],
)
def test_losses_agree_in_every_step(ours: dict[str, Any], theirs: dict[str, Any], verdict: str) -> None:
    found = parts._agreement(Agreement("x", "a", "b", 0.1), {"a": ours, "b": theirs})
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("code", "key", "words"),
    [
        ("print('warming up'); raise SystemExit('no more memory')", "error", "no more memory (exit code 1)"),
        ("print('error: no FP8 on this GPU'); raise SystemExit(2)", "refused", "no FP8 on this GPU"),
        ("import os; os.kill(os.getpid(), 9)", "error", "no output (exit code -9)"),
    ],
)
def test_a_process_that_finds_nothing_has_last_words(
    code: str, key: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "played.py").write_text(code)
    monkeypatch.setattr(children, "WORKER", "played")
    child = children.Child(tmp_path, "x", {}, {"PYTHONPATH": str(tmp_path)}, waits=False)
    assert child.wait(time.monotonic() + 600) == {key: words}


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "played.py").write_text("import time\nwhile True: time.sleep(1)")
    monkeypatch.setattr(children, "WORKER", "played")
    child = children.Child(tmp_path, "x", {}, {"PYTHONPATH": str(tmp_path)}, waits=False)
    assert child.wait(time.monotonic())["error"].startswith("not finished after ")
    assert not psutil.pid_exists(child._process.pid)


def test_what_the_budget_ends_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "played.py").write_text("import time\nwhile True: time.sleep(1)")
    monkeypatch.setattr(children, "WORKER", "played")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Bench("cpu", True, time.monotonic(), tmp_path) as bench:
        assert bench.finish(bench.start("x", "late"), limit=600) == {"refused": "not finished within --budget"}
    with Bench("cpu", False, time.monotonic() + 600, tmp_path) as bench:
        assert "not finished after" in bench.finish(bench.start("x", "slow"), limit=0)["error"]


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from megatron_txssm.check.gpu.children import Child
child = Child(Path({str(tmp_path)!r}), "x", {{"kind": "kernels", "device": "cpu", "small": True}}, {{}}, waits=True)
print(child._process.pid, flush=True)
time.sleep(9999)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)


def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "megatron_txssm.cli",
        *ON_CPU,
        "--only",
        "kernels",
        "--out",
        str(tmp_path / "f"),
    ]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        family: list[psutil.Process] = []
        while not family and process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=600) == 130
    # The kernel ends those that had just been started.
    while any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family):
        time.sleep(0.05)
    assert not list(tmp_path.glob("txssm-check-gpu-*"))


@pytest.mark.parametrize(("device", "mfu"), [("NVIDIA H100 80GB HBM3", 0.25), ("NVIDIA T4", None)])
def test_mfu_where_the_peak_is_known(device: str, mfu: float | None) -> None:
    row = {"step_seconds": 1.0, "tokens_per_second": 989e12 / 4e9, "peak_memory_bytes": 2**30, "lm loss": 4.0}
    figures = speed._figures({"rows": [row] * STEPS, "flops_per_token": 1e9, "device": device})
    assert figures.get("MFU") == mfu
    assert (", MFU 25.0%, 1.0 GiB" in speed._said(figures)) == (mfu is not None)
