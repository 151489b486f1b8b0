"""Packed documents as collators of transformers and TRL mark them, under every implementation of attention."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from megatron_txssm.hf import TransXSSMCache
from tests.hf.attention_kernels import IMPLEMENTATIONS, use_attention
from tests.hf.tiny import VARIANTS, random_ids, tiny_model, worst_difference

# A deprecation inside transformers, and torch's warning about uncompiled flex attention.
pytestmark = [
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]
# With chunks of 16: borders inside a chunk, at its edge, after one token (less than the convolution reaches back).
LENGTHS = (13, 3, 1, 1, 22)
BORDERS = [0, 13, 16, 17, 18, 40]
TOLERANCE = 2e-5
variants = pytest.mark.parametrize("variant", VARIANTS)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def collated(ids: Tensor, **options: bool) -> dict[str, Any]:
    """The collator's output for documents of LENGTHS; TRL's packing collator returns all of these fields."""
    features = [{"input_ids": document.tolist()} for document in ids[0].split(LENGTHS)]
    return DataCollatorWithFlattening(return_tensors="pt", **options)(features)


WAYS: dict[str, dict[str, bool]] = {
    "positions": {},
    "numbers": {"return_seq_idx": True},
    "lengths": {"return_flash_attn_kwargs": True},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
    "numbers alone": {"return_position_ids": False, "return_seq_idx": True},
    "lengths alone": {"return_position_ids": False, "return_flash_attn_kwargs": True},
}


@variants
@implementations
@torch.no_grad()
def test_documents_have_the_logits_that_they_have_alone(
    variant: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(variant), random_ids(1, sum(LENGTHS))
    alone = torch.cat([model(document).logits for document in ids.split(LENGTHS, dim=1)], dim=1)
    borders = use_attention(model, implementation, monkeypatch)
    for way, options in WAYS.items():
        output = model(**collated(ids, **options))
        assert worst_difference(output.logits, alone) < TOLERANCE, way
        assert output.loss is not None
    if implementation == "flash_attention_2" and model.config.has_attention:
        assert borders == [BORDERS] * len(WAYS)


@implementations
@torch.no_grad()
def test_rows_of_a_batch_are_packed_each_in_its_way(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Document numbers recur, each time for a new document."""
    model, ids = tiny_model("jamba"), random_ids(2, 20)
    seq_idx = torch.tensor([[0] * 7 + [1] + [0] * 12, [5] * 18 + [2] * 2])
    expected = [torch.cat([model(d).logits for d in ids[0:1].split((7, 1, 12), dim=1)], dim=1)]
    expected += [torch.cat([model(d).logits for d in ids[1:2].split((18, 2), dim=1)], dim=1)]
    use_attention(model, implementation, monkeypatch)
    assert worst_difference(model(ids, seq_idx=seq_idx).logits, torch.cat(expected)) < TOLERANCE


@variants
@implementations
@torch.no_grad()
def test_padding_beside_packed_documents(variant: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the left, between documents, within one, on the right; by numbers and by positions."""
    model, ids = tiny_model(variant), random_ids(1, 20)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    seq_idx = torch.tensor([[7] * 4 + [8] * 2 + [9] * 4 + [3] + [9] * 7 + [4] * 2])
    position_ids = torch.tensor([[0, 0, 0, 1, 0, 1, 0, 0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 0, 0]])
    alone = [model(ids[:, places]).logits for places in ([2, 3], [4, 5], [7, 8, 9, *range(11, 18)])]
    expected = torch.cat(alone, dim=1)
    use_attention(model, implementation, monkeypatch)
    for given in ({"seq_idx": seq_idx}, {"position_ids": position_ids}):
        if implementation == "flash_attention_2" and model.config.has_attention:
            with pytest.raises(ValueError, match="'flash_attention_2' takes padding or packed documents, not both"):
                model(ids, attention_mask=mask, **given)
            continue
        logits = model(ids, attention_mask=mask, **given).logits[:, mask[0].bool()]
        assert worst_difference(logits, expected) < TOLERANCE, list(given)


@implementations
@torch.no_grad()
def test_texts_that_are_not_packed_under_every_implementation(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding, with explicit positions, and token by token after a cache."""
    model, ids = tiny_model(), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    whole = model(ids).logits
    borders = use_attention(model, implementation, monkeypatch)
    assert worst_difference(model(ids, attention_mask=mask).logits[mask.bool()], expected) < TOLERANCE
    borders.clear()
    assert worst_difference(model(ids, position_ids=torch.arange(20)[None]).logits, whole) < TOLERANCE
    cache = TransXSSMCache(model.config)
    parts = [model(part, cache=cache).logits for part in ids.split([18, 1, 1], dim=1)]
    assert worst_difference(torch.cat(parts, dim=1), whole) < TOLERANCE
    assert not borders


@torch.no_grad()
def test_what_follows_packed_documents_is_refused() -> None:
    model, ids = tiny_model(), random_ids(1, 20)
    seq_idx = (torch.arange(20) // 8)[None]
    cache = TransXSSMCache(model.config)
    model(ids, seq_idx=seq_idx, cache=cache)
    with pytest.raises(ValueError, match="the cache holds packed documents, and it is unknown which of them continues"):
        model(ids, cache=cache)
    cache.reset()
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 20 tokens of one; leave out either them or the cache"):
        model(ids, seq_idx=seq_idx, cache=cache)
    with pytest.raises(ValueError, match=r"seq_idx.shape=\[1, 19\] does not fit the tokens; use \[1, 20\]"):
        model(ids, seq_idx=seq_idx[:, 1:])
