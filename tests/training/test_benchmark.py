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


@pytest.mark.parametrize(("length", "ratio"), [(4096, 1.193), (8192, 1.395), (16384, 1.765)])
def test_each_ratio_stands_beside_that_of_the_flops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], length: int, ratio: float
) -> None:
    tool = runpy.run_path(str(TOOL))
    seconds = {"transxssm": 2.0, "llama3": 2 * ratio + 0.1, "llama3 materialised": 2 * ratio - 0.1}
    main = tool["main"]
    monkeypatch.setitem(main.__globals__, "in_a_process", lambda model, *_: [seconds[model]])
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--lengths", str(length), "--turns", "1"])
    main()
    assert capsys.readouterr().out.splitlines() == [
        f"{length:6d} tokens: transxssm 2.00 s",
        f"    llama3 {2 * ratio + 0.1:.2f} s: {ratio + 0.05:.2f}x, {ratio:.3f}x by FLOPs: "
        "faster than FLOPs alone explain",
        f"    llama3 materialised {2 * ratio - 0.1:.2f} s: {ratio - 0.05:.2f}x, {ratio:.3f}x by FLOPs: "
        "not faster than FLOPs alone explain",
    ]
