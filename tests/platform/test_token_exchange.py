"""What experts exchange over gloo: counts, and unequal parts of tensor-parallel processes."""

from pathlib import Path
from typing import Any

import torch

from tests.support.ranks import model_parallel, run_ranks


def test_counts_of_tokens_are_numbers_that_collectives_take(one_process: None) -> None:
    """Where Megatron moves them from a GPU, it makes numpy's of those by which tokens are sent."""
    import torch.distributed as dist
    from megatron.core.transformer.moe import token_dispatcher

    counts = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3]), as_numpy=True)
    sent, received = torch.arange(3.0), torch.zeros(3)
    dist.all_to_all_single(received, sent, counts, counts)
    assert torch.equal(received, sent)
    # The others are computed with.
    stays: Any = torch.tensor([3])
    nothing: Any = None
    assert token_dispatcher.maybe_move_tensor_to_cpu(stays, record_stream=True) is stays
    assert token_dispatcher.maybe_move_tensor_to_cpu(nothing, as_numpy=True) is None


def gathered(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All ranks' rows, the gradient of this rank's (row i is weighted by i + rank), and the sum of the weighted."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    with model_parallel(tensor=2):
        rank = dist.get_rank()
        own = (torch.arange(2.0 * sizes[rank]).view(-1, 2) + 100 * rank).requires_grad_()
        whole = gather_from_sequence_parallel_region(own, output_split_sizes=sizes)
        weights = (torch.arange(float(sum(sizes))) + rank)[:, None]
        (whole * weights).sum().backward()
        reduced = reduce_scatter_to_sequence_parallel_region(whole.detach() * weights, input_split_sizes=sizes)
    assert own.grad is not None
    return whole.detach(), own.grad, reduced


def test_unequal_parts_are_gathered_and_their_gradients_summed(tmp_path: Path) -> None:
    for number, sizes in enumerate(([3, 1], [0, 2], [2, 2], [0, 0])):
        rows = [torch.arange(2.0 * size).view(-1, 2) + 100 * rank for rank, size in enumerate(sizes)]
        expected = torch.cat(rows)
        # i + 0 and i + 1.
        sums = (2 * torch.arange(float(sum(sizes))) + 1)[:, None]
        results = run_ranks(gathered, 2, tmp_path / str(number), sizes)
        for rank, (whole, gradient, reduced) in enumerate(results):
            assert torch.equal(whole, expected)
            assert torch.equal(gradient, sums.expand(-1, 2).split(sizes)[rank])
            assert torch.equal(reduced, (sums * expected).split(sizes)[rank])
