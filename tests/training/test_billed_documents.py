"""The documents that a step's attention is billed for: those of its micro-batches, once each."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.training.training import consume_seqlen_stats_in_iteration

from megatron_txssm.training.forward_step import count_documents

# Two samples of eight tokens: documents of 3 and 5 tokens, and one of 8, which begins with the sample.
POSITIONS_BL = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])


@pytest.fixture(autouse=True)
def nothing_counted() -> None:
    consume_seqlen_stats_in_iteration()


@pytest.mark.parametrize("vp_stage", [None, 0])
def test_tokens_and_squared_lengths(vp_stage: int | None) -> None:
    model: Any = SimpleNamespace(training=True, module=SimpleNamespace(vp_stage=vp_stage))
    for _ in range(2):
        count_documents(POSITIONS_BL, model)
    assert consume_seqlen_stats_in_iteration() == (2 * 16, 2 * (9 + 25 + 64))
    assert consume_seqlen_stats_in_iteration() == (None, None), "the next step begins anew"


@pytest.mark.parametrize(("training", "vp_stage"), [(False, None), (True, 1)])
def test_neither_validation_nor_a_second_virtual_stage_counts(training: bool, vp_stage: int | None) -> None:
    count_documents(POSITIONS_BL, SimpleNamespace(training=training, vp_stage=vp_stage))
    assert consume_seqlen_stats_in_iteration() == (None, None)
