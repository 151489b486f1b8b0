"""tools/benchmark_training.py, as far as it takes no minutes."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_training.py"


def test_on_a_gpu_the_benchmark_names_the_tool_for_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--turns", "0"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL))["main"]()
    assert end.value.code == 2
    assert "use: txssm check gpu --only speed\n" in capsys.readouterr().err
