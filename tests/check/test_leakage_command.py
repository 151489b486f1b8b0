"""txssm check leakage as a user runs it: documents that are isolated, and a layout where they are not."""

from pathlib import Path

import pytest

from megatron_txssm.check import runs
from megatron_txssm.cli.main import main

REPOSITORY = Path(__file__).parents[2]


def rows_of(said: str) -> dict[str, list[str]]:
    return {words[0]: words for line in said.splitlines() if (words := line.split())}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo_cpu", "jamba_320m"])
def test_no_bit_of_a_document_reaches_the_next(
    recipe: str, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = ("tp2_sp", "pp2_vpp2", "cp2", "cp2_all_to_all", "tp2_sp_cp2", "cp4")
    words = [word for name in layouts for word in ("--layout", name)]
    assert main(["check", "leakage", recipe, "--packings", "16", *words]) == 0
    said = capsys.readouterr().out
    rows = rows_of(said)
    for name in layouts:
        # Processes, verdict, logits compared, changed under isolation, and without it.
        assert int(rows[name][3].replace(",", "")) > 10_000 and rows[name][4] == "0"
        assert float(rows[name][5].rstrip("%,")) > 50 and rows[name][2] == "isolated"
    assert f"{recipe} trains with data.isolate_documents=false" in said
    assert list(temporary.iterdir()) == []


def test_a_leak_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runs, "WORKER", "tests.check.leaky_worker")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    words = ["--nproc", "2", "--packings", "4", "--layout", "tp2_sp", "--layout", "pp2"]
    assert main(["check", "leakage", "demo_cpu", "--set", "data.isolate_documents=true", *words]) == 3
    said = capsys.readouterr().out
    rows = rows_of(said)
    assert rows["tp2_sp"][2] == "isolated"
    assert rows["pp2"][2] == "LEAKS" and int(rows["pp2"][4].replace(",", "")) > 1000
    assert said.endswith("NOT isolated under data.isolate_documents=true: pp2\n")


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "leakage", "demo_cpu", "--packings", "0"]) == 2
    assert "--packings 0 must be at least 1" in capsys.readouterr().err
