"""What the dry run counts of collectives, on fake processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_txssm.planning.dry_run.watch import GroupNames, Watch
from tests.support.ranks import run_ranks


def counted(exchange: Callable[[], None]) -> dict[str, int]:
    """ "collective, group" -> bytes, of `exchange` on one of four fake processes; their group is called dp."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    assert dist.group.WORLD is not None
    with Watch(GroupNames({"dp": dist.group.WORLD})) as watch:
        exchange()
    dist.destroy_process_group()
    return {", ".join(kind): size for kind, size in watch.traffic.items()}


def gather_scatter_and_sum() -> None:
    part, whole = torch.zeros(10), torch.zeros(40)
    dist.all_gather_into_tensor(whole, part)
    dist.reduce_scatter_tensor(part, whole)
    dist.all_reduce(part)
    dist.all_reduce(part)


def several_tensors_at_once() -> None:
    parts, wholes = (torch.zeros(10), torch.zeros(3)), (torch.zeros(40), torch.zeros(12))
    with dist._coalescing_manager():
        for whole, part in zip(wholes, parts, strict=True):
            dist.all_gather_into_tensor(whole, part)
    with dist._coalescing_manager():
        for part in parts:
            dist.all_reduce(part)


def numbers_and_a_barrier() -> None:
    dist.all_reduce(torch.zeros(2))
    dist.barrier()


@pytest.mark.parametrize(
    ("exchange", "traffic"),
    [
        (gather_scatter_and_sum, {"all_gather, dp": 160, "reduce_scatter, dp": 160, "all_reduce, dp": 80}),
        (several_tensors_at_once, {"all_gather, dp": 4 * (40 + 12), "all_reduce, dp": 4 * (10 + 3)}),
        (numbers_and_a_barrier, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_bytes_of_collectives(exchange: Callable[[], None], traffic: dict[str, int], tmp_path: Path) -> None:
    # In a process of its own: torch has one default group, and other tests leave theirs.
    assert run_ranks(counted, 1, tmp_path, exchange) == [traffic]
