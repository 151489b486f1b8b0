"""Slow runs: throughput against the run's own median, and the ranks that the others wait for.

A slow rank slows all ranks, because they meet in collectives, and every rank's step takes equally long. The slow rank
is the one that does not wait: the others spend its extra time in collectives.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

# Minimum time in steps of one throughput sample, so that a hiccup does not count.
SAMPLE_SECONDS = 10.0
# Consecutive samples before a run counts as slow, or as recovered.
SAMPLES_IN_A_ROW = 3
# Minimum number of samples for a median, and maximum number that it is taken over.
MIN_SAMPLES, MAX_SAMPLES = 5, 500
# Minimum difference in waiting between the other ranks and a slow rank, as a fraction of a step's extra time.
CLEAR_SHARE = 0.5
# Lower limit of that extra time, as a fraction of a usual step, so that noise is not divided by almost zero.
MIN_EXCESS = 0.3


class ThroughputWatch:
    """Detects when throughput (in any unit) falls below `fraction` of its own median, and when it recovers.

    `history`: samples of the same run with the same number of ranks. Slow samples are left out of the median, so that a
    long slow period does not become normal.
    """

    def __init__(self, fraction: float, history: Iterable[float] = ()):
        self.fraction = fraction
        self.samples = deque(history, maxlen=MAX_SAMPLES)
        self.is_slow = False
        # The last sample as a fraction of the median; None before it is known.
        self.share: float | None = None
        self.in_a_row = 0
        self.work, self.seconds = 0.0, 0.0

    @property
    def is_as_usual(self) -> bool:
        """False until there is a median and a sample of this process near it."""
        return not self.is_slow and self.in_a_row == 0 and self.share is not None

    def add(self, work: float, seconds: float) -> bool:
        """Add some steps' work and time; True if the run became slow or recovered."""
        self.work, self.seconds = self.work + work, self.seconds + seconds
        if self.seconds < SAMPLE_SECONDS:
            return False
        sample, self.work, self.seconds = self.work / self.seconds, 0.0, 0.0
        if len(self.samples) < MIN_SAMPLES:
            self.samples.append(sample)
            return False
        self.share = sample / statistics.median(self.samples)
        # Hysteresis: recovery needs more than the limit for slowness.
        limit = (1 + self.fraction) / 2 if self.is_slow else self.fraction
        is_slow = self.share < limit
        if not is_slow and not self.is_slow:
            self.samples.append(sample)
        self.in_a_row = self.in_a_row + 1 if is_slow != self.is_slow else 0
        if self.in_a_row < SAMPLES_IN_A_ROW:
            return False
        self.is_slow, self.in_a_row = is_slow, 0
        return True


@dataclass(frozen=True)
class Verdict:
    """The ranks that a slow run waits for."""

    # Throughput as a fraction of the median.
    fraction: float
    # The cause, in words.
    reason: str
    # Empty if all ranks are similar.
    ranks: list[int] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.fraction:.0%} of its median throughput: {self.reason}"

    def as_fields(self) -> Mapping[str, object]:
        return asdict(self) | {"fraction": round(self.fraction, 3)}


def judge(fraction: float, shares: Sequence[float], hosts: Sequence[str], usual: Sequence[float] | None) -> Verdict:
    """Find the ranks that a slow run waits for, from every rank's fraction of time in collectives.

    `fraction`: the run's throughput over its usual one. `usual`: the `shares` while the run was not slow, if known:
    stages of a pipeline wait unequally.
    """
    # A step now takes 1 / fraction usual steps. Fraction of the extra time that each rank waits: all of it behind a
    # slow rank or network, none of it if the rank itself is slow.
    excess = max(1 / fraction - 1, MIN_EXCESS)
    before = usual or [0.0] * len(shares)
    rises = [(share / fraction - old) / excess for share, old in zip(shares, before, strict=True)]
    low, high = min(rises), max(rises)
    ranks = [rank for rank, rise in enumerate(rises) if rise <= (low + high) / 2]
    if high - low >= CLEAR_SHARE and len(ranks) <= len(shares) / 2:
        nodes = list(dict.fromkeys(hosts[rank] for rank in ranks))
        others = statistics.median(shares[rank] for rank in range(len(shares)) if rank not in ranks)
        own = statistics.median(shares[rank] for rank in ranks)
        word = "rank" if len(ranks) == 1 else "ranks"
        reason = (
            f"the others wait for {word} {', '.join(map(str, ranks))} on {', '.join(nodes)} "
            f"({others:.0%} of a step against {own:.0%})"
        )
        return Verdict(fraction, reason, ranks, nodes)
    if len(shares) == 1:
        return Verdict(fraction, f"check {hosts[0]}'s clocks and other processes, and the data files")
    waiting = f"no rank stands out; they spend {statistics.median(shares):.0%} of a step in collectives"
    if usual is None:
        return Verdict(fraction, waiting)
    waiting += f", {statistics.median(usual):.0%} before"
    if statistics.median(rises) >= CLEAR_SHARE:
        return Verdict(fraction, f"{waiting}: check the network")
    return Verdict(fraction, f"{waiting}: all ranks are slower; check the nodes' clocks and the data files")
