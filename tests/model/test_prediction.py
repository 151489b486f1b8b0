"""What a prediction depth reads and is asked for: the next tokens of the same document, at any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.model.documents import PackedDocuments
from megatron_txssm.model.prediction import roll_tokens
from tests.support.ranks import run_ranks

# Two rows of 8 tokens: documents of 3, 1 and 4 tokens, and of 8.
POSITIONS_BL = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])
TOKENS_BL = torch.tensor([[11, 12, 13, 21, 31, 32, 33, 34], [41, 42, 43, 44, 45, 46, 47, 48]])
NEXT_BL = torch.tensor([[12, 13, 0, 0, 32, 33, 34, 0], [42, 43, 44, 45, 46, 47, 48, 0]])
NEXT_IN_SAMPLE_BL = torch.tensor([[12, 13, 21, 31, 32, 33, 34, 0], [42, 43, 44, 45, 46, 47, 48, 0]])


def test_the_next_token_is_of_the_same_document() -> None:
    documents = PackedDocuments.from_position_ids(POSITIONS_BL)
    rolled, _ = roll_tokens(TOKENS_BL, packed_seq_params=documents)
    assert torch.equal(rolled, NEXT_BL)
    # A second depth: the token after the next.
    twice, _ = roll_tokens(rolled, packed_seq_params=documents)
    assert torch.equal(twice[0], torch.tensor([13, 0, 0, 0, 33, 34, 0, 0]))


def test_without_documents_it_is_of_the_same_sample() -> None:
    rolled, total = roll_tokens(TOKENS_BL)
    assert torch.equal(rolled, NEXT_IN_SAMPLE_BL) and total == NEXT_IN_SAMPLE_BL.sum()
    mask, tokens = roll_tokens(torch.ones(2, 8))
    assert torch.equal(mask, (NEXT_IN_SAMPLE_BL > 0).float()) and tokens == 14


def rolled_on_this_rank(isolated: bool) -> tuple[Tensor, float]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    group: Any = parallel_state.get_context_parallel_group()
    own = Zigzag.of(group).own
    documents = PackedDocuments.from_position_ids(POSITIONS_BL) if isolated else None
    rolled, _ = roll_tokens(own(TOKENS_BL), cp_group=group, packed_seq_params=documents)
    _, tokens = roll_tokens(own(torch.ones(2, 8)), cp_group=group, packed_seq_params=documents)
    return rolled, float(tokens)


@pytest.mark.parametrize(("isolated", "wanted"), [(False, NEXT_IN_SAMPLE_BL), (True, NEXT_BL)])
def test_context_parallel_ranks_share_the_next_tokens(isolated: bool, wanted: Tensor, tmp_path: Path) -> None:
    ranks = run_ranks(rolled_on_this_rank, 2, tmp_path, isolated)
    for rank, (rolled, tokens) in enumerate(ranks):
        assert torch.equal(rolled, Zigzag(2, rank).own(wanted))
        # Ranks with different numbers of tokens divide their sums by the same number.
        assert tokens == int((wanted > 0).sum()) / 2
