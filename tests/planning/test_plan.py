"""`txssm plan`: what it prints, the overlay that it writes, and its errors."""

import errno
import os
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import thread as futures_thread
from pathlib import Path

import pytest

from megatron_txssm.architecture.gpus import GPUS
from megatron_txssm.cli.main import main
from megatron_txssm.planning import finalists, overlay
from megatron_txssm.planning.dry_run.run import DryRunFailed
from megatron_txssm.planning.layouts import layout_of
from megatron_txssm.recipe.loader import load_recipe

PLANNER = Path(__file__).parents[2] / "docs" / "planner.md"
# By formula alone.
PLAN = ("plan", "--dry-runs", "0")


def test_a_plan_shows_memory_traffic_speed_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "transxssm_1.3b", "--gpus", "16", "--set", "parallel.pipeline_model_parallel_size=4"]) == 0
    text = capsys.readouterr().out
    assert "1,306M parameters" in text
    for head in ("tokens/s", "MFU", "GPU-hours", "weights", "activations", "near misses:", "pipeline bubble"):
        assert head in text
    # Every kind of stage, and the collectives between them.
    assert "0 of 4" in text and "3 of 4" in text
    assert "send_recv" in text and "embedding" in text


def test_days_are_those_of_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PLAN, "transxssm_1.3b", "--gpus", "8", "--top", "1"]
    hours = []
    for tokens in ("1000000000000", "2000000000000"):
        assert main([*words, "--target-tokens", tokens]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dp8"))
        hours.append(float(row.split()[-1].replace(",", "")))
    assert hours[1] == pytest.approx(2 * hours[0], rel=1e-3)


def test_the_overlay_is_a_recipe_with_the_best_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "planned.yaml"
    change = "training.global_batch_tokens=4194304"
    assert main([*PLAN, "transxssm_1.3b", "--gpus", "64", "--set", change, "--top", "1", "--out", str(out)]) == 0
    recipe = load_recipe(out)
    best = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dp64"))
    assert layout_of(recipe, 64).name == best.split()[0]
    assert recipe.training.global_batch_tokens == 4_194_304
    assert recipe.model == load_recipe("transxssm_1.3b").model


def test_an_overlay_of_a_file_names_it_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    base = tmp_path / "mine" / "base.yaml"
    base.write_text("extends: transxssm_320m\nmegatron:\n  mock_data: true\ndata:\n  corpus: null\n  weights: null\n")
    out = tmp_path / "planned.yaml"
    assert main([*PLAN, str(base), "--gpus", "8", "--out", str(out)]) == 0
    assert "extends: mine/base.yaml" in out.read_text()
    assert load_recipe(out).megatron["mock_data"] is True


def test_an_existing_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("extends: transxssm_320m\n")
    assert main([*PLAN, "transxssm_320m", "--gpus", "8", "--out", str(out)]) == 2
    assert f"error: {out} exists" in capsys.readouterr().err
    assert out.read_text() == "extends: transxssm_320m\n"


def test_an_impossible_request_gets_the_nearest_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "planned.yaml"
    words = [*PLAN, "transxssm_1.3b", "--gpus", "5", "--set", "parallel.tensor_model_parallel_size=4"]
    assert main([*words, "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "5 GPUs cannot be divided by tensor_model_parallel_size=4; the nearest number that works is 4" in text
    assert "tp4_sp" in text
    assert not out.exists() and "was not written" in text


def test_gpus_of_one_gigabyte(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["transxssm_1.3b", "--gpus", "8", "--set", "parallel.context_parallel_size=1", "--gpu-memory"]
    assert main([*PLAN, *words, "1"]) == 1
    assert "nothing fits on 8 GPUs" in capsys.readouterr().out
    assert main([*PLAN, *words, "0.01"]) == 1
    assert "use GPUs with more memory" in capsys.readouterr().out


def test_the_nearest_of_numbers_that_are_far_apart(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["transxssm_1.3b", "--gpus", "100001", "--layout", "tp8_sp_pp48_zero1_mb1"]
    assert main([*PLAN, *words]) == 1
    assert "the nearest number that works is 98304" in capsys.readouterr().out


def test_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(overlay, "write_file_atomically", full)
    out = tmp_path / "planned.yaml"
    assert main([*PLAN, "transxssm_320m", "--gpus", "8", "--out", str(out)]) == 2
    assert f"error: --out {out} cannot be written: No space left on device" in capsys.readouterr().err


def test_the_documentation_lists_every_gpu() -> None:
    row = next(line for line in PLANNER.read_text().splitlines() if line.startswith("| `--gpu NAME`"))
    assert row.partition("): ")[2].rstrip(" |") == ", ".join(gpu.name for gpu in GPUS)


def test_a_faster_layout_that_does_not_fit_is_a_near_miss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "transxssm_1.3b", "--gpus", "8", "--gpu-memory", "60"]) == 0
    text = capsys.readouterr().out
    # 69.6 GiB of the fastest layout, of 0.92 of 60.
    assert "dp8_zero1_mb8" in text and "GiB too large" in text


def test_sweep_shows_both_kinds_of_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "scaling.png"
    assert main([*PLAN, "transxssm_320m", "--sweep", "64,8", "--layout", "zero1_mb4", "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert text.index("strong scaling") < text.index("weak scaling")
    weak = text[text.index("weak scaling") :].splitlines()
    # As many samples a GPU: 256 on 8, 2048 on 64.
    assert weak[2].split()[:2] == ["8", "256"] and weak[3].split()[:2] == ["64", "2,048"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--gpus", "8", "--gpu", "h100"], "--gpu h100 is unknown; use one of a100-40"),
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        ([], "--gpus is missing"),
        (["--gpus", "8", "--memory-fraction", "1.5"], "--memory-fraction 1.5"),
        (["--gpus", "8", "--gpu-memory", "0"], "--gpu-memory 0"),
        (["--gpus", "8", "--gpu-memory", "nan"], "--gpu-memory nan"),
        (["--gpus", "1000000000"], "1,000,000,000 GPUs are more than any cluster has"),
        (["--gpus", "8", "--layout", "tp2_mb1", "--set", "parallel.recompute=full"], "state the same field"),
        (["--sweep", "8,16", "--layout", "tp2_dp4_mb1"], "leave dp4 out"),
        (["--gpus", "8", "--gpu", "a100-80", "--set", "training.fp8=hybrid"], "--gpu a100-80: training.fp8_recipe"),
        (["--gpus", "8", "--out", "no name.yaml"], "name='no name' must be letters"),
        (["--gpus", "8", "--plot", "x.png"], "add --sweep"),
        (["--sweep", "0,8"], "--sweep 0 must be at least 1"),
        (["--sweep", "8", "--gpus", "8"], "--gpus 8 has no effect on a sweep"),
        (["--sweep", "8", "--out", "x.yaml"], "--out x.yaml has no effect on a sweep"),
        (["--gpus", "8", "--out", "plan.txt"], "must end in .yaml"),
        (["--gpus", "8", "--set", "parallel.tensor_model_parallel_size=3"], "tensor_model_parallel_size=3"),
        (["--sweep", "8", "--plot", "no/such/folder/x.png"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PLAN, "transxssm_1.3b", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert wanted in error


def test_counts_that_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*PLAN, "transxssm_1.3b", "--sweep", "8,many"])
    assert stop.value.code == 2
    assert "8,many" in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_layouts_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["parallel.pipeline_model_parallel_size=2", "model.layer_pattern=M-*-M-*-"]
    words = [
        "--gpus",
        "8",
        "--top",
        "2",
        "--dry-runs",
        "2",
        *(word for change in changes for word in ("--set", change)),
    ]
    assert main(["plan", "transxssm_320m", *words]) == 0
    text = capsys.readouterr().out
    tried = text.partition("dry runs")[2].partition("GiB a GPU, by dry run")[0]
    rows = [line.split() for line in tried.splitlines() if line.endswith("fits")]
    assert len(rows) == 2
    for _, formula, exact, _ in rows:
        assert float(formula) == pytest.approx(float(exact), rel=0.03)


def test_one_layout_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["transxssm_320m", "--gpus", "8", "--layout", "tp2_sp_pp2_dp2_zero1_mb4"]
    assert main([*PLAN, *words]) == 0
    assert "1 layout fits" in (text := capsys.readouterr().out) and "tp2_sp_pp2_dp2_zero1_mb4:" in text
    assert main([*PLAN, *words[:-1], "tp2_xx3"]) == 2
    assert "'xx3' is no part of a layout" in capsys.readouterr().err
    for wrong, said in (
        ("tp2_tp4_mb1", "states with 'tp4' what another part"),
        ("tp2_dp3_mb1", "has 6 GPUs, not --gpus 8"),
    ):
        assert main([*PLAN, *words[:-1], wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "transxssm_320m", "--gpus", "8", "--out", str(tmp_path / "none" / "planned.yaml")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_without_a_dry_run_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DryRunFailed("no memory")

    monkeypatch.setattr(finalists, "run_ranks", fail)
    out = tmp_path / "planned.yaml"
    assert main(["plan", "transxssm_320m", "--gpus", "8", "--top", "1", "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "failed: no memory" in text and "no dry run fits; --dry-runs 0 goes by formula" in text
    assert not out.exists()


def test_sigterm_leaves_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert Path(command[-1]).is_relative_to(tmp_path)
        # Not while the pool still starts this thread, which it would not wait for: a real dry run takes seconds.
        while threading.current_thread() not in futures_thread._threads_queues:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", ended)
    with pytest.raises(SystemExit) as ending:
        main(["plan", "transxssm_320m", "--gpus", "8", "--dry-runs", "1"])
    assert ending.value.code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
