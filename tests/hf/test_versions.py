"""Supported transformers versions: others give a one-line error; the newest gives the same results as the oldest."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_txssm.hf.standalone import write_code
from megatron_txssm.hf.versions_transxssm import FIRST_REFUSED, NEWEST_TESTED, OLDEST, check_version

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# tools/bootstrap fills it from requirements.txt beside this file.
PACKAGES = Path(sys.prefix) / "transformers_newest"
# Tests of names that change between versions: experts, generation, the cache, arguments, masks, and the exported code.
FILES = (
    "test_experts.py",
    *("test_generation.py", "test_cache.py", "test_arguments.py", "test_packing_collators.py", "test_standalone.py"),
    # The proof of a conversion.
    "../convert/proof/test_greedy.py",
)


def pin(file: str) -> str:
    found = re.search(r"^transformers==(\S+)", (ROOT / file).read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_oldest_and_the_newest_version_are_those_that_tests_run_with() -> None:
    assert f'"transformers>={OLDEST},<{FIRST_REFUSED}"' in (ROOT / "pyproject.toml").read_text()
    assert pin("requirements.txt").startswith(f"{OLDEST}.")
    assert pin("tests/hf/requirements.txt").startswith(f"{NEWEST_TESTED}.")
    assert f"transformers {OLDEST} and {NEWEST_TESTED} are tested" in (ROOT / "docs/convert.md").read_text()


@pytest.mark.parametrize("version", ["4.57.6", "5.4.0", "5.22.2", "6.0.0", "6.0.0.dev0", "10.1"])
def test_another_version_is_refused(version: str) -> None:
    with pytest.raises(
        ImportError, match=rf"needs transformers>=5.23,<6, and version {version} is .* run: pip install"
    ):
        check_version(version)


@pytest.mark.parametrize(
    ("version", "warns"),
    [("5.23.0", False), ("5.23.0.dev0", False), (f"{NEWEST_TESTED}.9", False), ("5.99.0", True), ("5.99.0.dev0", True)],
)
def test_a_version_that_was_not_tested_warns(version: str, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        check_version(version)
    finally:
        logger.removeHandler(caplog.handler)
    assert (f"transformers {version} is newer than {NEWEST_TESTED}" in caplog.text) is warns


def test_the_refusal_comes_before_what_another_version_lacks(tmp_path: Path) -> None:
    """With a library that has only a version; from our package, and from either module of an exported folder."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text("__version__ = '4.57.6'\n")
    (tmp_path / "exported").mkdir()
    write_code(tmp_path / "exported")
    for module in ("megatron_txssm.hf", "exported.configuration_transxssm", "exported.modeling_transxssm"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            capture_output=True,
            text=True,
        )
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1, module
        assert "TransXSSM needs transformers>=5.23,<6, and version 4.57.6 is installed" in last, done.stderr


@pytest.mark.slow
def test_the_newest_version() -> None:
    if not (PACKAGES / "transformers").is_dir():
        options = f"--no-deps --require-hashes --target {PACKAGES} -r tests/hf/requirements.txt"
        pytest.skip(f"no {PACKAGES}; make it: pip install {options}")
    script = (
        "import sys, transformers, pytest; assert transformers.__version__ == sys.argv[1], transformers.__version__; "
        "sys.exit(pytest.main(sys.argv[2:]))"
    )
    # Beam search and sampling cover the same as the long greedy texts, in a fifth of the time.
    arguments = [pin("tests/hf/requirements.txt"), "-q", "-x", "-p", "no:cacheprovider", "-k", "not greedy_tokens"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, *(str(HERE / name) for name in FILES)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGES), str(ROOT)]), "PYTEST_ADDOPTS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
