"""When a run counts as slow, and whom it waits for."""

import statistics
from typing import Any

import pytest
import torch

from megatron_txssm.training.watch import stragglers
from megatron_txssm.training.watch.stragglers import CollectiveTime, earlier_throughput, share_of_trace
from megatron_txssm.training.watch.throughput import (
    MIN_SAMPLES,
    SAMPLE_SECONDS,
    SAMPLES_IN_A_ROW,
    ThroughputWatch,
    judge,
)


def changes(watch: ThroughputWatch, *rates: float) -> list[bool]:
    return [watch.add(rate * SAMPLE_SECONDS, SAMPLE_SECONDS) for rate in rates]


@pytest.fixture
def watch() -> ThroughputWatch:
    """Of a run that makes 100 a second, until now."""
    watch = ThroughputWatch(0.7)
    assert not any(changes(watch, *[100.0] * MIN_SAMPLES))
    return watch


def test_a_run_that_stays_as_it_was_is_not_slow(watch: ThroughputWatch) -> None:
    assert not any(changes(watch, *[100, 90, 110, 71, 72, 130, 71, 71, 71] * 20))
    assert watch.is_as_usual


def test_a_hiccup_is_not_slow(watch: ThroughputWatch) -> None:
    assert not any(changes(watch, *[10] * (SAMPLES_IN_A_ROW - 1), 100, *[10] * (SAMPLES_IN_A_ROW - 1), 100))
    # Nor what is shorter than a sample, however slow.
    for _ in range(20):
        assert not watch.add(1e-9, SAMPLE_SECONDS / 10)
        assert not watch.add(100 * SAMPLE_SECONDS, 0.9 * SAMPLE_SECONDS)


def test_it_becomes_slow_once_and_well_again_once(watch: ThroughputWatch) -> None:
    assert changes(watch, *[69] * SAMPLES_IN_A_ROW) == [*[False] * (SAMPLES_IN_A_ROW - 1), True]
    assert watch.is_slow and watch.share == pytest.approx(0.69)
    # However long: what is slow is no rule, and just above the limit is not well yet.
    assert not any(changes(watch, *[30] * 1000, *[84] * 1000))
    assert watch.is_slow
    assert changes(watch, *[86] * SAMPLES_IN_A_ROW) == [*[False] * (SAMPLES_IN_A_ROW - 1), True]
    assert not watch.is_slow
    assert statistics.median(watch.samples) == 100


def test_before_there_is_a_median_nothing_is_slow() -> None:
    watch = ThroughputWatch(0.7)
    assert not any(changes(watch, 100, *[1] * (MIN_SAMPLES - 1)))
    assert not watch.is_as_usual


def test_a_run_that_starts_slow_is_held_against_what_it_was(tmp_path: Any) -> None:
    """On a requeue with a bad node."""
    import json

    def line(tflops: float, **more: Any) -> str:
        return json.dumps({"grad_norm": 1, "model_tflops_per_second_per_rank": tflops, "world_size": 8} | more) + "\n"

    metrics = tmp_path / "metrics.jsonl"
    old = '{"iteration": 1, "grad_norm": 1, "model_tflops_per_second_per_rank": 7}\n'
    validation = '{"iteration": 1, "validation lm loss": 1}\n'
    metrics.write_text(old + validation + line(5e-10) * 9 + line(9e-10, world_size=4) + line(1e-10, slow={}) * 20)
    history = earlier_throughput(metrics, 8)
    assert history == [pytest.approx(500)] * 9
    watch = ThroughputWatch(0.7, history)
    assert changes(watch, *[100] * SAMPLES_IN_A_ROW)[-1]
    assert earlier_throughput(tmp_path / "none", 8) == []


HOSTS = ["n1", "n1", "n2", "n2"]


@pytest.mark.parametrize(
    ("shares", "usual", "ranks", "nodes", "words"),
    [
        ([0.9, 0.9, 0.9, 0.1], None, [3], ["n2"], "wait for rank 3 on n2 (90% of a step against 10%)"),
        # The collectives of tensor parallelism keep the ranks of a node together.
        ([0.9, 0.9, 0.2, 0.1], None, [2, 3], ["n2"], "wait for ranks 2, 3 on n2 (90% of a step against 15%)"),
        # A stage of a pipeline that never waits is not slow by that.
        ([0.9, 0.5, 0.9, 0.1], [0.4, 0.5, 0.4, 0.1], [1, 3], ["n1", "n2"], "wait for ranks 1, 3 on n1, n2"),
        ([0.3, 0.3, 0.3, 0.1], [0.3, 0.3, 0.3, 0.1], [], [], "all ranks are slower"),
        ([0.8, 0.8, 0.8, 0.7], [0.3, 0.3, 0.3, 0.1], [], [], "check the network"),
        # One that does not wait for three is not the one that the others wait for.
        ([0.1, 0.1, 0.1, 0.9], None, [], [], "no rank stands out; they spend 10% of a step in collectives"),
        ([0.5, 0.5, 0.5, 0.4], None, [], [], "no rank stands out"),
        # Of four that no more wait, none is the one that the others wait for, whoever waited before.
        ([0.05, 0.05, 0.05, 0.06], [0.05, 0.05, 0.05, 0.4], [], [], "all ranks are slower"),
    ],
)
def test_who_does_not_wait_is_waited_for(
    shares: list[float], usual: list[float] | None, ranks: list[int], nodes: list[str], words: str
) -> None:
    verdict = judge(0.314, shares, HOSTS, usual)
    assert (verdict.ranks, verdict.nodes) == (ranks, nodes)
    assert words in verdict.reason
    assert str(verdict).startswith("31% of its median throughput: ")
    assert verdict.as_fields()["fraction"] == 0.314


def test_a_run_that_is_nearly_well_again_waits_for_nobody() -> None:
    for fraction in (0.95, 1.0, 1.3):
        assert judge(fraction, [0.30, 0.32, 0.33, 0.34], HOSTS, [0.32] * 4).ranks == []
    assert judge(0.9, [0.37, 0.26], HOSTS[1:3], [0.37, 0.37]).ranks == []


def test_one_process_waits_for_nobody() -> None:
    assert judge(0.5, [0.0], ["n1"], None).reason == "check n1's clocks and other processes, and the data files"


def entry(created: int, duration_ms: float | None) -> dict[str, Any]:
    return {"time_created_ns": created, "duration_ms": duration_ms}


def test_the_share_of_a_step_from_nccls_recorder() -> None:
    """Durations in ms, the rest in ns."""
    ms = 1_000_000
    steps = [(0, 100 * ms, 0.0), (200 * ms, 300 * ms, 0.0)]
    # Not those between the steps, as of a validation, nor those without a time.
    entries = [entry(0, 10), entry(90 * ms, 20), entry(150 * ms, 999), entry(250 * ms, 30), entry(260 * ms, None)]
    assert share_of_trace({"entries": entries}, steps) == pytest.approx(60 / 200)
    # The ring has lost what was before.
    assert share_of_trace({"entries": entries[1:]}, steps) == pytest.approx(30 / 100)
    assert share_of_trace({"entries": [entry(250 * ms, 30)]}, steps) == pytest.approx(30 / 50)
    # Those of several streams overlap.
    assert share_of_trace({"entries": [entry(0, 80), entry(1, 80), entry(2, 80)]}, steps[:1]) == 1.0
    assert share_of_trace({"entries": [entry(0, None)]}, steps) == 0.0
    assert share_of_trace({}, steps) == 0.0


def test_a_recorder_that_fails_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dump: bytes) -> Any:
        raise KeyError("entries")

    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(stragglers, "read_trace", fail)
    # Without its constructor, which would time this process's waits.
    assert CollectiveTime.__new__(CollectiveTime).share() == 0.0
