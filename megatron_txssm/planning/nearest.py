"""The nearest answer to a request that no layout meets: another number of GPUs, or the least memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_txssm.architecture.gpus import GIB
from megatron_txssm.planning.layouts import candidates
from megatron_txssm.planning.ranking import Ranking, least_memory, rank_layouts
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.recipe.recipe import Recipe

# How often the number of GPUs is doubled to find one on which something fits.
DOUBLED = 6


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
        legal = next((n for n in _around(gpus) if candidates(recipe, n, cluster.per_node, fixed).legal), None)
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


def _around(count: int) -> Iterator[int]:
    """Numbers near `count`, the nearest first, the lower of two before the higher."""
    for distance in range(1, max(count, 64)):
        yield from (number for number in (count - distance, count + distance) if number > 0)
