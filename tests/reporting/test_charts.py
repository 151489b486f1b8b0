"""Curves as paths: spikes and gaps survive the buckets, means are not shifted, axes have round ticks."""

import math
import re

import numpy as np
import pytest

from megatron_txssm.reporting.charts import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Curve,
    buckets,
    chart,
    log_ticks,
    running_mean,
    short,
    ticks,
)


def draw(*curves, **options):
    found = chart("Loss", curves, x_name="steps", y_name="nats", **options)
    assert found is not None
    return found


def test_a_spike_of_one_step_stays_and_the_rest_is_a_mean():
    x, y = np.arange(1.0, 100_001.0), np.full(100_000, 2.0)
    y[43_210], y[77_000] = 9.0, 0.5
    found = buckets(x, y, (1.0, 100_000.0), 900)
    assert len(found.x) == 900 and found.high.max() == 9.0 and found.low.min() == 0.5
    spike = int(found.high.argmax())
    assert abs(found.x[spike] - 43_211) <= 100_000 / 900
    assert found.mean[spike] == pytest.approx(2.0 + 7.0 / 111, abs=1e-3)


def test_a_curve_of_any_length_has_as_many_points_as_a_screen():
    (curve,) = draw(Curve("training", np.arange(1.0, 100_001.0), np.random.default_rng(0).random(100_000))).curves
    assert curve.line.count("L") == MAX_POINTS - 1 and len(curve.values["x"]) == MAX_POINTS
    # Forward and back.
    assert curve.band.count("L") == 2 * MAX_POINTS - 1
    assert curve.window == 317


def test_few_points_are_drawn_where_they_are():
    found = draw(Curve("training", np.array([0.0, 5.0, 10.0]), np.array([0.0, 4.0, 10.0])), from_zero=True)
    (curve,) = found.curves
    assert (curve.line, curve.band, curve.dots, curve.window) == ("M0 1000L1000 619L2000 48", "", "", 1)
    assert curve.values == {"x": [0, 5, 10], "y": [0, 4, 10], "low": [0, 4, 10], "high": [0, 4, 10]}
    assert (WIDTH, HEIGHT) == (2000, 1000)


def test_values_that_are_not_finite_interrupt_the_line_and_are_named():
    y = np.array([1.0, 2.0, math.nan, math.inf, 3.0, 4.0])
    (curve,) = draw(Curve("training", np.arange(6.0), y)).curves
    assert curve.line.count("M") == 2 and curve.missing == [2.0, 3.0]
    assert "nan" not in curve.line and curve.values["x"] == [0, 1, 4, 5]
    assert chart("Loss", [Curve("training", np.arange(2.0), np.full(2, math.nan))], x_name="", y_name="") is None


def test_a_single_point_and_validations_are_dots():
    (one,) = draw(Curve("training", np.array([1.0]), np.array([5.0])), log=True).curves
    assert re.fullmatch(r"M1000 \d+h0", one.dots)
    (few,) = draw(Curve("validation", np.arange(3.0), np.ones(3), dots=True)).curves
    assert few.dots.count("h0") == 3


def test_the_mean_is_neither_shifted_nor_cut():
    ramp = np.arange(100.0)
    assert running_mean(ramp, 11) == pytest.approx(ramp)
    ramp[50] = math.nan
    mean = running_mean(ramp, 3)
    assert math.isnan(mean[50]) and (mean[49], mean[51], mean[10]) == (48.5, 51.5, 10)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (1, 320, [100, 200, 300]),
        (0, 0.0031, [0, 0.001, 0.002, 0.003]),
        (-3, 7, [-2, 0, 2, 4, 6]),
    ],
)
def test_ticks_are_round(low, high, wanted):
    assert ticks(low, high, 5) == pytest.approx(wanted)


def test_ticks_of_a_logarithmic_axis():
    assert log_ticks(0.001, 1000) == pytest.approx([0.001, 0.01, 0.1, 1, 10, 100, 1000])
    assert log_ticks(2.2, 11) == pytest.approx([3, 4, 5, 6, 8]) or log_ticks(2.2, 11)[0] <= 3
    narrow = log_ticks(2.31, 2.37)
    assert len(narrow) >= 3 and all(2.29 <= tick <= 2.4 for tick in narrow)


def test_numbers_are_short():
    shown = ["0", "12", "1.5k", "100k", "2B", "419.4B", "3e-4", "1.5e-5", "0.004"]
    assert [short(value) for value in (0, 12, 1500, 1e5, 2e9, 4.194e11, 3e-4, 1.5e-5, 0.004)] == shown


def test_only_resumes_within_the_curve_are_marked():
    found = draw(Curve("training", np.array([0.0, 10.0]), np.array([1.0, 2.0])), marks=[0.0, 5.0, 11.0])
    assert found.marks == [1000.0]
