"""Curves as SVG paths and axis ticks: a chart of 100,000 steps is as small as one of 1,000.

The steps of a curve are put into buckets along the x axis. A bucket keeps its smallest and largest value, so that a
spike of one step stays visible, and the mean. All positions are in units of a chart's width and height (WIDTH, HEIGHT),
from the upper left corner; the page stretches them to the size that it has.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 2000, 1000
# Of all lines of a chart together, and of one.
POINTS, MAX_POINTS = 3600, 900
# From this many points on, the line is a running mean over about their square root, and all values a band behind it.
SMOOTH_FROM_POINTS = 100
# With more, the dots would hide the line.
MOST_DOTS = 60
# Empty space above and below the curves, as a share of their height.
_MARGIN = 0.05
# On a logarithmic axis, which multiples of a power of ten get a tick: the first row with enough ticks is used.
_LOG_TICKS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9))


@dataclass(frozen=True)
class Curve:
    """A curve of N points in ascending x, float64 [N]; a value that is not finite interrupts it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    # Which of the page's colours.
    color: int = 0
    # Measurements apart from one another, each drawn as a dot.
    dots: bool = False
    # As in SMOOTH_FROM_POINTS.
    smooth: bool = True


class Tick(NamedTuple):
    """A label at a share of the axis, from the left or from the top."""

    share: float
    label: str


class Drawn(NamedTuple):
    """A curve as SVG paths, and its values for the script that shows them; empty paths draw nothing."""

    curve: Curve
    line: str
    band: str
    dots: str
    # Points per mean; 1 if the line shows every value.
    window: int
    # The x of values that are not finite.
    missing: list[float]
    # Lists of the same length: the buckets' mean x, mean y, least and greatest y.
    values: dict[str, list[float]]


class Chart(NamedTuple):
    """What the page needs to draw a chart."""

    title: str
    x_name: str
    # Unit, for people.
    y_name: str
    curves: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    # Smallest and largest x.
    x_range: tuple[float, float]
    # x of the beginnings of attempts after the first.
    marks: list[float]


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_name: str,
    y_name: str,
    log: bool = False,
    from_zero: bool = False,
    marks: Iterable[float] = (),
) -> Chart | None:
    """Draw curves into one chart; None if none of them has a finite value.

    log: a logarithmic y axis, if all values are positive. from_zero: the y axis begins at zero. marks: see Chart.
    """
    curves = [curve for curve in curves if (np.isfinite(curve.y) & np.isfinite(curve.x)).any()]
    if not curves:
        return None
    x_range = _range(np.concatenate([curve.x[np.isfinite(curve.y)] for curve in curves]))
    y_all = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    log = log and bool(y_all.min() > 0)
    low, high = _range(np.append(y_all, 0.0) if from_zero else y_all, relative=log)
    bottom, top = (math.log(low), math.log(high)) if log else (low, high)
    margin = _MARGIN * (top - bottom)
    bottom, top = (bottom if from_zero else bottom - margin), top + margin

    def place_y(y: np.ndarray) -> np.ndarray:
        return HEIGHT * (top - (np.log(y) if log else y)) / (top - bottom)

    def place_x(x: np.ndarray) -> np.ndarray:
        return WIDTH * (x - x_range[0]) / (x_range[1] - x_range[0])

    count = max(60, min(MAX_POINTS, POINTS // max(1, sum(not curve.dots for curve in curves))))
    values = log_ticks(low, high) if log else ticks(bottom, top, 5)
    y_ticks = [Tick(float(place_y(np.array(value))) / HEIGHT, short(value)) for value in values]
    x_ticks = [Tick(float(place_x(np.array(value))) / WIDTH, short(value)) for value in ticks(*x_range, 7)]
    return Chart(
        title=title,
        x_name=x_name,
        y_name=y_name,
        curves=[_draw(curve, count, x_range, place_x, place_y) for curve in curves],
        x_ticks=x_ticks,
        y_ticks=[tick for tick in y_ticks if -1e-9 <= tick.share <= 1 + 1e-9],
        x_range=x_range,
        marks=[float(place_x(np.array(x))) for x in marks if x_range[0] < x < x_range[1]],
    )


class Buckets(NamedTuple):
    """Points of a curve, put together; all float64 [B], NaN where a bucket has no finite value."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def buckets(x: np.ndarray, y: np.ndarray, x_range: tuple[float, float], count: int) -> Buckets:
    """Put the points of a curve into at most `count` equal parts of the x axis, empty ones left out."""
    number = np.minimum((count * (x - x_range[0]) / (x_range[1] - x_range[0])).astype(np.int64), count - 1)
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    finite = np.isfinite(y)
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / np.add.reduceat(finite.astype(float), starts)
    held = np.where(finite, y, math.nan)
    sizes = np.diff(starts, append=len(x))
    return Buckets(
        np.add.reduceat(x, starts) / sizes, mean, np.fmin.reduceat(held, starts), np.fmax.reduceat(held, starts)
    )


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values within an odd window around each point, narrower at both ends; float64 [N].

    NaN where the point itself is not finite.
    """
    finite, at = np.isfinite(y), np.arange(len(y))
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    # The same on both sides, so that the curve is not shifted.
    half = np.minimum(window // 2, np.minimum(at, at[::-1]))
    begin, end = at - half, at + half + 1
    return np.where(finite, (total[end] - total[begin]) / np.maximum(number[end] - number[begin], 1), math.nan)


def _draw(curve: Curve, count: int, x_range: tuple[float, float], place_x, place_y) -> Drawn:
    use = np.isfinite(curve.x) & (curve.x >= x_range[0]) & (curve.x <= x_range[1])
    x, y = curve.x[use], curve.y[use]
    found = buckets(x, y, x_range, count)
    window = math.isqrt(len(y)) | 1 if curve.smooth and len(y) >= SMOOTH_FROM_POINTS else 1
    mean = buckets(x, running_mean(y, window), x_range, count).mean if window > 1 else found.mean
    at, line = place_x(found.x), _path(place_x(found.x), place_y(mean))
    varies = window > 1 or bool((found.high > found.low).any())
    values = {"x": found.x, "y": found.mean, "low": found.low, "high": found.high}
    keep = np.isfinite(found.mean)
    return Drawn(
        curve=curve,
        line=line,
        band=_band(at, place_y(found.high), place_y(found.low)) if varies else "",
        dots="".join(f"M{x:.0f} {y:.0f}h0" for x, y in zip(at[keep], place_y(mean[keep]), strict=True))
        if keep.sum() == 1 or (curve.dots and keep.sum() <= MOST_DOTS)
        else "",
        window=window,
        missing=x[~np.isfinite(y)].tolist(),
        values={name: [_rounded(value) for value in column[keep].tolist()] for name, column in values.items()},
    )


def _runs(y: np.ndarray) -> Iterator[slice]:
    """The stretches of finite values."""
    finite = np.isfinite(y).astype(np.int8)
    edges = np.flatnonzero(np.diff(finite, prepend=0, append=0))
    yield from (slice(begin, end) for begin, end in edges.reshape(-1, 2).tolist())


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "".join(f"M{_points(x[part], y[part])}" for part in _runs(y))


def _band(x: np.ndarray, high: np.ndarray, low: np.ndarray) -> str:
    """Forward along the greatest values, back along the least."""
    parts = []
    for part in _runs(high):
        parts.append(f"M{_points(x[part], high[part])}L{_points(x[part][::-1], low[part][::-1])}Z")
    return "".join(parts)


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return "L".join(f"{a:.0f} {b:.0f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _rounded(value: float) -> float | int:
    """Five digits are more than a screen shows; the x of a bucket with one step stays that step."""
    if value == round(value) and abs(value) < 1e15:
        return round(value)
    return float(f"{value:.5g}") if abs(value) < 1e5 else round(value)


def _range(values: np.ndarray, *, relative: bool = False) -> tuple[float, float]:
    """Smallest and largest; widened if they are the same, by a factor if `relative`."""
    low, high = float(values.min()), float(values.max())
    if low < high:
        return low, high
    if relative:
        return low / 1.5, high * 1.5
    width = abs(low) / 2 or 1.0
    return low - width, high + width


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in a range, about `most` of them at equal distances: multiples of 1, 2 or 5 times a power of 10."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range of a logarithmic axis, at least a twelfth of the axis apart."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for multiples in _LOG_TICKS:
        found = [multiple * 10.0**power for power in powers for multiple in multiples]
        found = [value for value in found if low * 0.95 <= value <= high * 1.05]
        if len(found) >= 4:
            break
    if len(found) < 4:
        return [value for value in ticks(low, high, 5) if value > 0]
    kept: list[float] = []
    for value in found:
        if not kept or math.log(value / kept[-1]) > math.log(high / low) / 12:
            kept.append(value)
    return kept


def short(value: float) -> str:
    """A number for an axis or a tile: 1500 as 1.5k, 2e9 as 2B, 0.0003 as 3e-4."""
    if 0 < abs(value) < 0.001:
        return f"{value:.3g}".replace("e-0", "e-") if abs(value) < 0.0001 else f"{value * 1e4:.3g}e-4"
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.4g}{suffix}"
    return f"{value:.4g}"
