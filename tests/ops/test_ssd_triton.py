"""Runs triton_checks.py in separate processes: on the GPU if there is one, else under Triton's interpreter.

Triton decides on import whether to interpret. mamba-ssm without its compiled part must not be importable anywhere else
(tests/ops/requirements.txt says why), so tools/bootstrap installs it into a folder beside the environment's packages.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from triton import knobs

from megatron_txssm.ops import ssd_triton
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.session.start import prepare_kernels

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = Path(sys.prefix) / "mamba_ssm"


def run_checks(*arguments: str, paths: tuple[Path, ...] = (), **environment: str) -> str:
    """pytest's output for triton_checks.py, all of whose tests passed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", "-q", *arguments]
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [*command, str(HERE / "triton_checks.py")],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (*paths, HERE, *inherited))),
            "PYTEST_ADDOPTS": "",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_pinned_version_is_that_of_gpu_nodes() -> None:
    files = (HERE / "requirements.txt", ROOT / "requirements-gpu.txt", ROOT / "docs/gpu.md")
    for package in ("mamba-ssm", "einops"):
        pins = [pin for file in files for pin in re.findall(rf"\b{package}==(\S+)", file.read_text())]
        assert len(pins) > 1 and len(set(pins)) == 1, pins


@pytest.mark.parametrize("word", ["deterministic_mode", "--deterministic-mode"])
def test_a_deterministic_run_tells_mamba_ssm(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for on, value in (("false", None), ("true", "1")):
        monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
        monkeypatch.setenv("TRITON_CACHE_AUTOTUNING", "1")
        if on == "false":
            monkeypatch.delenv("TRITON_CACHE_AUTOTUNING")
        prepare_kernels(load_recipe("demo_cpu", [f"megatron.{word}={on}"]))
        assert os.environ.get("MAMBA_DETERMINISTIC") == value
        # This variable would make mamba-ssm autotune block sizes even in a deterministic run.
        assert os.environ.get("TRITON_CACHE_AUTOTUNING") == ("1" if on == "false" else None)


@pytest.mark.parametrize(("stated", "fused"), [({}, True), ({"TRITON_DEFAULT_FP_FUSION": "0"}, False)])
def test_products_and_sums_are_fused_unless_the_environment_says_otherwise(stated: dict[str, str], fused: bool) -> None:
    """Whatever Triton's default is: 3.9 warns that 3.10 will no longer fuse them."""
    with patch.dict(os.environ):
        os.environ.pop("TRITON_DEFAULT_FP_FUSION", None)
        os.environ |= stated
        prepare_kernels(load_recipe("demo_cpu"))
        assert knobs.language.default_fp_fusion is fused
        assert "TRITON_DEFAULT_FP_FUSION" in os.environ


@pytest.mark.slow
@pytest.mark.parametrize("processors", ["1", "132"])
def test_kernels_by_the_interpreter(processors: str) -> None:
    """With one multiprocessor, and with an H100's number: then several programs share a group's heads."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which the test below runs the kernels")
    if not (PACKAGES / "mamba_ssm").is_dir():
        command = "MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation"
        options = f"--no-cache-dir --require-hashes --target {PACKAGES} -r tests/ops/requirements.txt"
        pytest.skip(f"no {PACKAGES}; make it: {command} {options}")
    environment = {"TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1", "INTERPRETED_PROCESSORS": processors}
    only = () if processors == "1" else ("-k", "recurrence and 77-1 or bf16")
    said = run_checks("-p", "triton_interpreter", *only, paths=(PACKAGES,), **environment)
    assert re.search(r"^\d+ passed", said, re.MULTILINE), said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: `python -m pytest -m gpu tests/ops`")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_kernels_on_the_gpu(precision: str) -> None:
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("needs mamba-ssm; docs/gpu.md says how to install it")
    run_checks(TRITON_F32_DEFAULT=precision)


def test_the_error_of_a_missing_package_keeps_no_frame_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setattr(ssd_triton, "_kernels", lambda: importlib.import_module("mamba_ssm"))
    error = ssd_triton.import_error.__wrapped__()
    assert error is not None and error.__traceback__ is None and error.__context__ is None
