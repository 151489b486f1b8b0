"""When a step is a spike: against the steps before it, upwards only, and never for want of variation."""

import math
import random

import pytest

from megatron_txssm.training.guard.window import SpikeWindow


def filled(losses: list[float], norms: list[float] | None = None, threshold: float = 6) -> SpikeWindow:
    window = SpikeWindow(len(losses), threshold)
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        window.add(loss, norm)
    return window


def test_the_z_scores_are_those_of_the_window() -> None:
    # Mean 3, deviation 1; mean 2, deviation 0.5.
    window = filled([2.0, 4.0] * 4, [1.5, 2.5] * 4)
    assert window.z_scores(9.5, 1.0) == pytest.approx((6.5, -2.0))
    assert window.is_spike(window.z_scores(9.5, 2.0))
    assert window.is_spike(window.z_scores(3.0, 5.5))
    assert not window.is_spike(window.z_scores(8.9, 4.9))


def test_a_fall_is_no_spike() -> None:
    window = filled([2.0, 4.0] * 4)
    assert not window.is_spike(window.z_scores(-50.0, 0.0))


def test_nothing_is_judged_before_the_window_is_full() -> None:
    window = SpikeWindow(8, 6)
    for _ in range(7):
        window.add(3.0, 1.0)
        assert window.z_scores(1e9, 1e9) == (0, 0)
    window.add(3.0, 1.0)
    assert window.is_spike(window.z_scores(4.0, 1.0))


def test_only_the_last_steps_count() -> None:
    window = filled([100.0] * 8)
    for _ in range(8):
        window.add(3.0, 1.0)
    assert window.is_spike(window.z_scores(4.0, 1.0))


@pytest.mark.parametrize("loss", [3.0, 1e-8, 0.0])
def test_constant_values_have_no_spikes_by_rounding(loss: float) -> None:
    window = filled([loss] * 8)
    assert not window.is_spike(window.z_scores(loss * (1 + 1e-6), 1 + 1e-6))
    assert window.is_spike(window.z_scores(loss + 0.1, 1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_a_spike_even_before_the_window_is_full(value: float) -> None:
    window = SpikeWindow(8, 6)
    assert window.z_scores(value, 1.0) == (math.inf, 0)
    assert window.z_scores(1.0, value) == (0, math.inf)


def test_the_falling_loss_of_a_warm_up_has_no_spikes() -> None:
    draw, window = random.Random(0), SpikeWindow(32, 6)
    for step in range(2000):
        loss = 2 + 8 * math.exp(-step / 50) + draw.gauss(0, 0.05)
        norm = 0.5 + 5 * math.exp(-step / 30) + abs(draw.gauss(0, 0.1))
        assert not window.is_spike(window.z_scores(loss, norm)), step
        window.add(loss, norm)


def test_a_restored_window_judges_alike() -> None:
    window = filled([2.0, 4.0] * 4, [1.5, 2.5] * 4)
    another = SpikeWindow(8, 6)
    another.restore([list(pair) for pair in window.state()])
    assert another.z_scores(5.0, 3.0) == window.z_scores(5.0, 3.0)
    # A shorter window keeps the last steps.
    shorter = SpikeWindow(2, 6)
    shorter.restore(window.state())
    assert shorter.state() == window.state()[-2:]
