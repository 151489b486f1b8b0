"""docs/api.md: its examples run as they stand, and what it names is there."""

import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_examples_run_one_after_another(tmp_path: Path) -> None:
    program = []
    for kind, text in re.findall(r"```(python|yaml)\n(.*?)```", PAGE, re.DOTALL):
        if kind == "python":
            program.append(text)
        else:
            # Its first line is a comment that names the file.
            (tmp_path / text.split()[1]).write_text(text, encoding="utf-8")
    script = 'if __name__ == "__main__":\n' + textwrap.indent("\n".join(program), "    ")
    (tmp_path / "examples.py").write_text(script, encoding="utf-8")
    # Without sbatch, a submission is checked as far as it can be without a cluster.
    environment = os.environ | {"PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(
        [sys.executable, "examples.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    for wanted in (
        "data/library: all 1 tasks match their manifests",
        "is not divisible by num_attention_heads=3",
        "checked, nothing written, nothing queued",
        "the same as one process: all 1 layout",
        "the same model",
        "def main(",
    ):
        assert wanted in said, said
    assert not (tmp_path / "runs" / "larger").exists()


def test_every_function_that_is_named_is_there() -> None:
    named = re.findall(r"`((?:[a-z]+\.)+[a-z_]+\.[a-z_]+)`", PAGE)
    assert len(named) > 8
    for path in named:
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(f"megatron_txssm.{module}"), name)), path
