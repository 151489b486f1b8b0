"""Slow runs: throughput against the run's own median, and the ranks for which the others wait.

A slow rank makes all ranks slow, since they meet in collectives; every rank's step takes as long. What tells it apart
is that it is the one that does not wait: the others spend in collectives what it takes longer.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# One sample of throughput: at least so long a time spent in steps, so that a hiccup does not count.
SAMPLE_SECONDS = 10.0
# In a row, of a slow run and of one that is so no more.
SAMPLES_IN_A_ROW = 3
# Before them there is no median to speak of; and how many the median is taken over.
MIN_SAMPLES, MAX_SAMPLES = 5, 500
# Of what a step takes longer than usual: so much of it must the others wait longer than the one that they wait for.
CLEAR_SHARE = 0.5
# And what it takes longer counts as so much of a usual step at least, so that noise is not divided by next to nothing.
MIN_EXCESS = 0.1


class ThroughputWatch:
    """Says when throughput (in any unit) is below `fraction` of its own median, and when it has come back.

    `history`: samples of the same run at the same number of ranks. What is slow does not enter the median, so that a
    long slow time does not become the rule.
    """

    def __init__(self, fraction: float, history: Iterable[float] = ()):
        self.fraction = fraction
        self.samples = deque(history, maxlen=MAX_SAMPLES)
        self.is_slow = False
        # The last sample against the median; None before it can be said.
        self.share: float | None = None
        self.in_a_row = 0
        self.work, self.seconds = 0.0, 0.0

    @property
    def is_as_usual(self) -> bool:
        """As far as can be said: not before there is a median and a sample of this process that is near it."""
        return not self.is_slow and self.in_a_row == 0 and self.share is not None

    def add(self, work: float, seconds: float) -> bool:
        """Take what was done in some steps; True where the run became slow, or is so no more."""
        self.work, self.seconds = self.work + work, self.seconds + seconds
        if self.seconds < SAMPLE_SECONDS:
            return False
        sample, self.work, self.seconds = self.work / self.seconds, 0.0, 0.0
        if len(self.samples) < MIN_SAMPLES:
            self.samples.append(sample)
            return False
        self.share = sample / statistics.median(self.samples)
        # To be well again takes more than to be not quite slow.
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
    """Whom a slow run waits for."""

    # Its throughput, as a share of the median.
    fraction: float
    # What makes it slow, in words.
    reason: str
    # Empty where no rank stands out.
    ranks: list[int] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.fraction:.0%} of its median throughput: {self.reason}"

    def as_fields(self) -> dict[str, Any]:
        return asdict(self) | {"fraction": round(self.fraction, 3)}


def judge(fraction: float, shares: Sequence[float], hosts: Sequence[str], usual: Sequence[float] | None) -> Verdict:
    """Whom a run at `fraction` of its throughput waits for, by every rank's share of the steps' time in collectives.

    `usual`: those of the time when it was not slow, if they are known: stages of a pipeline wait unequally.
    """
    # A step takes 1 / fraction usual steps now. How much of what is new in it each rank waits: all of it behind a slow
    # rank or network, none of it where it is slow by itself.
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
        return Verdict(fraction, f"look at {hosts[0]}'s clocks, its other processes and the data's files")
    waiting = f"no rank stands out; they spend {statistics.median(shares):.0%} of a step in collectives"
    if usual is None:
        return Verdict(fraction, waiting)
    waiting += f", {statistics.median(usual):.0%} before"
    if statistics.median(rises) >= CLEAR_SHARE:
        return Verdict(fraction, f"{waiting}: look at the network")
    return Verdict(fraction, f"{waiting}: each is slower by itself; look at the nodes' clocks and the data's files")
