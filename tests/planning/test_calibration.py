"""`txssm plan --calibrate` on this machine, and what its file changes in a plan."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_txssm.architecture.gpus import GPUS
from megatron_txssm.cli.main import main
from megatron_txssm.errors import UserError
from megatron_txssm.planning.calibration.measure import line_through
from megatron_txssm.planning.corrections import Calibration, Corrections, Line, Link, read_calibration
from megatron_txssm.planning.layouts import Layout
from megatron_txssm.planning.ranking import Estimates
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.planning.step_time import StepTime
from megatron_txssm.recipe.loader import load_recipe
from tests.support.recipes import write_recipe

H100 = next(gpu for gpu in GPUS if gpu.name == "h100-sxm")
SLOW = Corrections(
    passes={part: (Line(2.0), Line(3.0, fixed=0.1)) for part in ("M", "-", "*", "head")},
    optimizer=5.0,
    micro_batch=0.25,
    step=0.5,
    links={"reduce_scatter": Link(1.0, 1e15), "all_gather": Link(2.0, 1e15)},
    alone=1.25,
)


def timed(corrections: Corrections, *, gpus: int = 1) -> StepTime:
    recipe = load_recipe("transxssm_320m", ["training.global_batch_tokens=131072", "megatron.overlap_grad_reduce=null"])
    return Estimates(recipe, Cluster(H100, 8, corrections)).plan(Layout(data=gpus, micro_batch=4)).time


def test_corrections_change_each_part_of_a_step() -> None:
    bare, slow = timed(Corrections()), timed(SLOW)
    # Eight micro-batches of 48 layers and the head, each with its fixed part.
    factors = slow.compute - 8 * 49 * 0.1
    # Two backward passes to a forward pass, more or less; the embedding, a hundredth, keeps its time.
    assert 2.4 * bare.compute < factors < 3 * bare.compute
    assert slow.optimizer == pytest.approx(5 * bare.optimizer)
    # Eight micro-batches of four samples of 4,096 tokens.
    assert (bare.host, slow.host) == (0, 8 * 0.25 + 0.5)
    assert slow.total == pytest.approx(slow.compute + slow.optimizer + slow.host)


def test_the_line_through_two_measurements() -> None:
    line = line_through([1.0, 2.0], [5.0, 8.0])
    assert line == Line(3.0, 2.0) and line.at(4.0) == 14.0
    # Noise must not make a part free, or faster the more it has to do.
    assert line_through([1.0, 2.0], [5.0, 4.0]) == line_through([1.0, 2.0], [5.0, 11.0]) == Line(5.0)


def test_measured_links_are_those_within_a_node() -> None:
    cluster = Cluster(H100, 8, SLOW)
    assert cluster.collective_seconds("all_gather", 1e9, members=8, stride=1) == pytest.approx(2.0, rel=1e-3)
    for collective, stride in (("all_reduce", 1), ("all_gather", 8)):
        elsewhere = Cluster(H100, 8).collective_seconds(collective, 1e9, 8, stride)
        assert cluster.collective_seconds(collective, 1e9, 8, stride) == elsewhere < 0.1


def test_processes_that_share_a_core_lose_less_by_waiting() -> None:
    separate, shared, partly = (Corrections(alone=factor) for factor in (1.0, 4.0, 2.0))
    assert separate.waiting(4) == 1 and shared.waiting(4) == 0
    # While one of two waits, the other has all of what both had.
    assert shared.waiting(2) == partly.waiting(2) == 0
    assert Corrections(alone=1.6).waiting(2) == pytest.approx(0.25)

    recipe = load_recipe("transxssm_320m", ["training.global_batch_tokens=131072"])
    waits = [
        Estimates(recipe, Cluster(H100, 8, corrections)).plan(Layout(pipeline=2, micro_batch=4)).time.bubble
        for corrections in (separate, Corrections(alone=1.6), shared)
    ]
    assert waits == [pytest.approx(share * waits[0]) for share in (1, 0.25, 0)] and waits[0] > 0


def test_a_file_holds_all_of_a_calibration(tmp_path: Path) -> None:
    calibration = Calibration(dataclasses.replace(H100, memory_bytes=1), "words", SLOW)
    calibration.write(tmp_path / "rates.json")
    assert read_calibration(tmp_path / "rates.json") == calibration


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "gpu": {}}', "\0"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rates.json"
    file.write_text(text)
    with pytest.raises(UserError, match="--rates"):
        read_calibration(file)


def test_contradictory_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = tmp_path / "rates.json"
    Calibration(H100, "words", SLOW).write(rates)
    for words, named in (
        (["--gpus", "8", "--gpu", "h200", "--rates", str(rates)], "--gpu h200"),
        (["--calibrate", str(rates)], "--gpus"),
        (["--gpus", "100000", "--calibrate", str(rates)], "--gpus 100000"),
        (["--gpus", "1", "--calibrate", str(tmp_path / "no" / "rates.json")], "no/rates.json"),
    ):
        assert main(["plan", "transxssm_320m", *words]) == 2
        assert named in capsys.readouterr().err


@pytest.mark.slow
def test_calibrating_this_machine_and_planning_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", {"megatron.mock_data": True}, run=tmp_path / "run")
    rates = tmp_path / "rates.json"
    assert main(["plan", str(recipe), "--gpus", "2", "--calibrate", str(rates)]) == 0
    said = capsys.readouterr().out
    assert "backward" in said and f"--rates {rates}" in said
    found = read_calibration(rates)
    assert set(found.corrections.passes) == {"M", "-", "*", "head"}
    assert all(line.factor > 0 and line.fixed >= 0 for lines in found.corrections.passes.values() for line in lines)
    assert set(found.corrections.links) == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"}
    assert found.gpu.name == "cpu" and "dp2" in found.measured and found.corrections.alone >= 1
    # A core has far less than a GPU, and far more than nothing.
    assert 1e8 < found.gpu.bf16_flops < 1e13 and 1e8 < found.gpu.memory_bandwidth < 1e12
    assert main(["plan", str(recipe), "--gpus", "2", "--rates", str(rates), "--dry-runs", "0"]) == 0
    planned = capsys.readouterr().out
    assert "2 cpu in nodes of 2" in planned and "CPU between kernels" in planned
    assert not (tmp_path / "run").exists(), json.dumps(sorted(map(str, tmp_path.iterdir())))
