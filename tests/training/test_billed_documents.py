"""The documents that a step's attention is billed for: those of its micro-batches, once each."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.parallel_state import get_data_parallel_rank
from megatron.training.training import consume_seqlen_stats_in_iteration

from megatron_txssm.training import forward_step
from megatron_txssm.training.forward_step import count_documents
from tests.support.ranks import model_parallel, run_ranks

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


# Of four ranks, with as many data-parallel ones as are left.
LAYOUTS = (
    {},
    {"tensor": 2},
    {"context": 2},
    {"pipeline": 2},
    {"tensor": 2, "context": 2},
    {"pipeline": 2, "context": 2},
    {"expert": 2},
)


def billed(layouts: tuple[dict[str, int], ...]) -> list[tuple[float | None, float | None]]:
    """What Megatron's loop is told of a step: of each data-parallel rank, one micro-batch of documents of its own."""
    forward_step.get_args = lambda: SimpleNamespace(isolate_documents=True, recall_pairs=None)
    found: list[tuple[float | None, float | None]] = []
    for layout in layouts:
        with model_parallel(**layout):
            # Documents of 3 and 5 tokens; of 4 and 4; …
            first = 3 + get_data_parallel_rank()
            positions_BL = torch.cat([torch.arange(first), torch.arange(8 - first)])[None]
            batch: dict[str, torch.Tensor] = dict.fromkeys(forward_step.BATCH_KEYS, positions_BL)
            forward_step.forward_step(iter([batch]), Model())
            found.append(consume_seqlen_stats_in_iteration())
    return found


class Model(torch.nn.Module):
    vp_stage = None

    def forward(self, *inputs: Any, **others: Any) -> torch.Tensor:
        return torch.zeros(())


def test_every_layout_is_billed_for_each_document_once(tmp_path: Path) -> None:
    first = [3**2 + 5**2, 4**2 + 4**2, 5**2 + 3**2, 6**2 + 2**2]
    expected = [(8 * count, sum(first[:count])) for count in (4, 2, 2, 2, 1, 1, 4)]
    for found in run_ranks(billed, 4, tmp_path, LAYOUTS):
        assert found == expected
