"""Runs te_checks.py and te_fp8_checks.py in a process of its own, in which Transformer Engine is importable.

Its Python part must not be importable anywhere else (te_stub.py says why), so it lies in a folder beside the
environment's packages, which tools/bootstrap fills from requirements.txt.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = Path(sys.prefix) / "transformer_engine"
CHECKS = [str(HERE / name) for name in ("te_checks.py", "te_fp8_checks.py")]


def test_the_pinned_version_is_that_of_gpu_nodes() -> None:
    pins = {
        match.group(1)
        for file in (HERE / "requirements.txt", ROOT / "requirements-gpu.txt")
        for match in re.finditer(r"^transformer-engine\S*?==(\S+)", file.read_text(), re.MULTILINE)
    }
    assert len(pins) == 1


def test_block_spec_of_transformer_engines_classes() -> None:
    if torch.cuda.is_available():
        pytest.skip("the stub is for machines without a GPU")
    if not (PACKAGES / "transformer_engine").is_dir():
        command = f"pip install --no-deps --require-hashes --target {PACKAGES} -r tests/te/requirements.txt"
        pytest.skip(f"no {PACKAGES}; make it: {command}")
    paths = [str(PACKAGES), str(HERE)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "te_stub", "-p", "no:cacheprovider", "-q", *CHECKS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^83 passed", done.stdout, re.MULTILINE), done.stdout
