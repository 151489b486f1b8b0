"""The nearest answer to a request that no layout meets: another number of GPUs, or the least memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_txssm.architecture.gpus import GIB
from megatron_txssm.planning.layouts import is_legal
from megatron_txssm.planning.ranking import Ranking, least_memory, rank_layouts
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import divisors

# How often the number of GPUs is doubled to find one on which something fits.
DOUBLED = 6
# How many numbers of GPUs near an impossible one are tried.
NEAR = 32


@dataclass(frozen=True)
class Answer:
    """A ranking for a number of GPUs, which is the one asked for unless that has no layout that fits.

    Attributes:
        problem: why the request itself has no answer; empty if it has
    """

    gpus: int
    ranking: Ranking
    problem: str


def answer(recipe: Recipe, gpus: int, cluster: Cluster, limit: float, fixed: Mapping[str, Any] | None = None) -> Answer:
    """The ranking on `gpus` GPUs, or on the nearest number on which a layout is legal and fits.

    If none fits on any number of GPUs tried, the ranking for `gpus`, or its nearest legal number, has no fitting plan.
    """
    asked = rank_layouts(recipe, gpus, cluster, limit, fixed)
    if asked.fitting:
        return Answer(gpus, asked, "")
    if asked.smallest is None:
        problem = f"no layout is legal on {_counted(gpus)}: {_reason(asked)}"
        legal = next((n for n in _near(recipe, gpus, cluster) if is_legal(recipe, n, cluster.per_node, fixed)), None)
        if legal is None:
            return Answer(gpus, asked, problem)
        asked = rank_layouts(recipe, legal, cluster, limit, fixed)
        if asked.fitting:
            return Answer(legal, asked, problem)
        gpus = legal
    assert asked.smallest is not None
    needed = asked.smallest.memory.peak
    problem = (
        f"nothing fits on {_counted(gpus)}: {asked.smallest.layout.name} needs the least, {needed / GIB:.1f} GiB of "
        f"{limit / GIB:.1f}"
    )
    for more in (gpus * 2**doubled for doubled in range(1, DOUBLED + 1)):
        least = least_memory(recipe, more, cluster, fixed)
        if least is not None and least <= limit:
            return Answer(more, rank_layouts(recipe, more, cluster, limit, fixed), problem)
        if least is None or least >= needed:
            # More GPUs than the recipe can use to divide its model.
            break
        needed = least
    return Answer(gpus, asked, problem)


def _counted(gpus: int) -> str:
    return f"{gpus:,} GPU{'s' if gpus > 1 else ''}"


def _reason(ranking: Ranking) -> str:
    """Why the first of the refused layouts was."""
    return ranking.refused[0].reason if ranking.refused else "there is none to try"


def _near(recipe: Recipe, count: int, cluster: Cluster) -> Iterable[int]:
    """Numbers near `count`, the nearest first, the lower of two before the higher, of which one may have a layout."""
    sizes = {1}
    # Tensor, pipeline and data parallelism; context parallelism takes powers of two of the usual lengths.
    copies = divisors(recipe.global_batch_size)
    contexts = divisors(recipe.training.seq_length)
    for axis in (range(1, cluster.per_node + 1), range(1, len(recipe.layers) + 1), copies, contexts):
        steps = tuple(axis)
        sizes = {size * step for size in sizes for step in steps if size * step <= 2 * count}
    return sorted(sizes, key=lambda size: (abs(size - count), size))[:NEAR]
