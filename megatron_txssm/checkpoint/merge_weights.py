"""How much each checkpoint of a merge counts.

A checkpoint is the first one plus the updates since; so a mean of checkpoints weighs each update by the sum of the
weights of the checkpoints after it. Weights of checkpoints from a constant learning rate can therefore be chosen such
that updates count as if the learning rate had fallen (WSM, arXiv:2507.17634, theorem 3.1). A linear fall gives equal
weights, which is the mean of the latest checkpoints (LAWA, arXiv:2306.03241).
"""

import itertools
import math
from collections.abc import Callable, Sequence

from megatron_txssm.choices import WsdDecayShape
from megatron_txssm.errors import UserError

# The learning rate over its decay: 1 at 0, 0 at 1. As in Megatron's OptimizerParamScheduler.
DECAYS: dict[WsdDecayShape, Callable[[float], float]] = {
    "exponential": lambda x: 2 * 0.5**x - 1,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def mean_weights(steps: Sequence[int]) -> list[float]:
    return [1 / len(steps)] * len(steps)


def wsd_weights(steps: Sequence[int], decay: WsdDecayShape) -> list[float]:
    """Weights that imitate WSD's decay over these ascending steps.

    The updates before a step count as the learning rate there; the decay ends one mean interval after the last step.
    """
    end = steps[-1] + (steps[-1] - steps[0]) / (len(steps) - 1)
    rates = [DECAYS[decay]((step - steps[0]) / (end - steps[0])) for step in steps]
    return [rate - later for rate, later in itertools.pairwise([*rates, 0.0])]


def ema_weights(steps: Sequence[int], decay: float) -> list[float]:
    """Weights that fall by the factor `decay` with each mean interval into the past; UserError unless in (0, 1)."""
    if not 0 < decay < 1:
        raise UserError(f"--ema-decay {decay:g} must be above 0 and below 1")
    interval = (steps[-1] - steps[0]) / (len(steps) - 1)
    weights = [decay ** ((steps[-1] - step) / interval) for step in steps]
    return [weight / sum(weights) for weight in weights]
