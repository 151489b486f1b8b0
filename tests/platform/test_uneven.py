"""Collectives of unequal parts on gloo, as experts under tensor parallelism need them."""

from pathlib import Path

import torch
from torch import Tensor

from tests.support.ranks import run_ranks

SIZES = [3, 0, 5]


def collect(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' rows, the ranks' sum of this rank's rows, and the gradient of the first."""
    from megatron.core.tensor_parallel import mappings

    group = torch.distributed.group.WORLD
    rank = torch.distributed.get_rank()
    own = (rows.split(SIZES)[rank] * (rank + 1)).requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(
        own, tensor_parallel_output_grad=True, group=group, output_split_sizes=SIZES
    )
    gathered.mul(torch.arange(8.0)[:, None]).sum().backward()
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(
        rows * (rank + 1), group=group, input_split_sizes=SIZES
    )
    assert own.grad is not None
    return gathered.detach(), scattered, own.grad


def test_parts_of_any_size(tmp_path: Path) -> None:
    rows = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    wanted = torch.cat([part * (rank + 1) for rank, part in enumerate(rows.split(SIZES))])
    weights = torch.arange(8.0)[:, None].expand(8, 2)
    for rank, (gathered, scattered, gradient) in enumerate(run_ranks(collect, 3, tmp_path, rows)):
        assert torch.equal(gathered, wanted)
        assert torch.allclose(scattered, rows.split(SIZES)[rank] * 6)
        # Each of the three ranks weights the gathered rows in the same way.
        assert torch.equal(gradient, weights.split(SIZES)[rank] * 3)
