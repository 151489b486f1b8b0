"""Context parallelism of the mixer: the bytes that both methods send, and that zigzags partition the sequence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import mappings

from megatron_txssm.model.context_parallel import Zigzag
from tests.support.ranks import model_parallel, run_ranks
from tests.support.tiny_model import build_mixer, state_space_config, transformer_config

RANKS = 2
LENGTHS = (4096, 16384, 65536)
# A layer of the 320M model, except for the width of its projections.
SIZES = {"num_heads": 12, "head_dim": 64, "state_size": 128, "num_groups": 4, "hidden_size": 16, "chunk_size": 64}


def bytes_sent(method: str) -> list[int]:
    """Bytes sent by this rank, forward and backward, for one sample of each length."""
    sent: list[int] = []
    names = {
        "dist_all_gather_func": lambda output, own: own.nbytes * (RANKS - 1),
        "dist_reduce_scatter_func": lambda output, whole: whole.nbytes * (RANKS - 1) // RANKS,
    }
    for name, size in names.items():
        setattr(mappings, name, counted(getattr(mappings, name), size, sent))
    exchange = counted(
        torch.distributed.all_to_all_single, lambda out, whole: whole.nbytes * (RANKS - 1) // RANKS, sent
    )
    torch.distributed.all_to_all_single = exchange
    totals = []
    with model_parallel(context=RANKS):
        config = transformer_config(hidden_size=16, context_parallel_size=RANKS)
        mixer = build_mixer(state_space_config(**SIZES, context_parallel_method=method), config)
        for length in LENGTHS:
            sent.clear()
            mixer(torch.randn(length // RANKS, 1, 16).requires_grad_())[0].sum().backward()
            totals.append(sum(sent))
    return totals


def counted(collective: Any, size: Any, sent: list[int]) -> Any:
    def call(output: Any, source: Any, *rest: Any, **options: Any) -> Any:
        sent.append(size(output, source))
        return collective(output, source, *rest, **options)

    return call


@pytest.mark.slow
def test_state_passing_sends_as_much_at_every_length(tmp_path: Path) -> None:
    passing, exchange = (run_ranks(bytes_sent, RANKS, tmp_path / m, m) for m in ("state_passing", "all_to_all"))
    for length, ours, theirs in zip(LENGTHS, passing[0], exchange[0], strict=True):
        print(f"{length} tokens: {ours / 2**20:.2f} MiB against {theirs / 2**20:.2f}, {theirs / ours:.1f}x")
    # fp32; two pieces per rank, forward and backward: every head's state and decay.
    heads, state = SIZES["num_heads"], SIZES["head_dim"] * SIZES["state_size"]
    piece = 4 * heads * (state + 1)
    assert passing == [[2 * 2 * piece * (RANKS - 1)] * len(LENGTHS)] * RANKS
    # x and y, B and C, dt of this rank's tokens, forward and backward.
    of_token = 4 * (2 * heads * SIZES["head_dim"] + 2 * SIZES["num_groups"] * SIZES["state_size"] + heads)
    assert exchange == [[2 * of_token * (n // RANKS) * (RANKS - 1) // RANKS for n in LENGTHS]] * RANKS


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_is_on_one_rank(size: int) -> None:
    whole = torch.arange(24)[None].expand(2, 24)
    own = [Zigzag(size, rank).own(whole) for rank in range(size)]
    assert torch.equal(torch.cat(own, dim=1).sort(1).values, whole)
    for rank, tokens in enumerate(own):
        zigzag = Zigzag(size, rank)
        assert tokens[0].tolist() == [t for r in zigzag.ranges(24 // size) for t in range(r.start, r.stop)]
        assert torch.equal(zigzag.unfold(zigzag.fold(tokens)), tokens)
        # Every rank has the same number of (query, earlier key) pairs.
        assert abs(int(tokens[0].sum()) - 276 // size) <= 24 // size
