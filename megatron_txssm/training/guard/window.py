"""Mean and deviation of the last trained steps, against which a step is judged."""

import math
import statistics
from collections import deque
from collections.abc import Sequence

# Loss and gradient norm of a step, or the z-score of each.
type Pair = tuple[float, float]

# Lower limit of a deviation, as a fraction of the mean: a loss that hardly varies has no spikes by rounding.
MIN_DEVIATION = 1e-3


class SpikeWindow:
    """The losses and gradient norms of the last `size` trained steps."""

    def __init__(self, size: int, threshold: float):
        self.size, self.threshold = size, threshold
        self.steps: deque[Pair] = deque(maxlen=size)

    def z_scores(self, loss: float, grad_norm: float) -> Pair:
        """How many deviations each is above its mean; infinity if it is not finite, 0 while the window is not full."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return tuple(0.0 if math.isfinite(value) else math.inf for value in (loss, grad_norm))  # pyright: ignore
        if len(self.steps) < self.size:
            return 0.0, 0.0
        losses, norms = zip(*self.steps, strict=True)
        return _z_score(loss, losses), _z_score(grad_norm, norms)

    def is_spike(self, z_scores: Pair) -> bool:
        return max(z_scores) > self.threshold

    def add(self, loss: float, grad_norm: float) -> None:
        """Called for every step that is trained on."""
        self.steps.append((loss, grad_norm))

    def state(self) -> list[Pair]:
        """For a checkpoint; `restore` takes it."""
        return list(self.steps)

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        self.steps = deque(((loss, norm) for loss, norm in state), maxlen=self.size)


def _z_score(value: float, values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    deviation = max(statistics.pstdev(values, mean), MIN_DEVIATION * abs(mean), 1e-30)
    return (value - mean) / deviation
