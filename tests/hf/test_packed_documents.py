"""Restarting position_ids: documents in one row are independent in every layer."""

import pytest
import torch
from torch import Tensor

from megatron_txssm.hf import TransXSSMCache
from tests.hf.tiny import VARIANTS, random_ids, tiny_model, worst_difference

variants = pytest.mark.parametrize("variant", VARIANTS)
# With chunks of 16: borders inside a chunk, at its edge, after one token (less than the convolution reaches back).
LENGTHS = (13, 3, 1, 23)
# Absolute, of logits around 5, in fp32.
TOLERANCE = 2e-5


def positions(batch: int, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths]).expand(batch, -1)


@variants
@pytest.mark.parametrize("use_cache", [None, False, True])
def test_packed_documents_have_the_logits_that_they_have_alone(variant: str, use_cache: bool | None) -> None:
    """With and without a cache; None takes the configuration's default, which is True."""
    model, ids = tiny_model(variant), random_ids(2, sum(LENGTHS))
    logits = model(ids, position_ids=positions(2), use_cache=use_cache).logits
    documents = zip(ids.split(LENGTHS, dim=1), logits.split(LENGTHS, dim=1), strict=True)
    for document, packed_logits in documents:
        assert worst_difference(packed_logits, model(document).logits) < TOLERANCE


@variants
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_document_changes_no_bit_and_gets_no_gradient(variant: str, implementation: str) -> None:
    model = tiny_model(variant, attn_implementation=implementation)
    ids, others = random_ids(1, sum(LENGTHS)), random_ids(1, sum(LENGTHS), seed=1)
    start = sum(LENGTHS[:3])
    results = []
    for before in (ids, others):
        text = torch.cat([before[:, :start], ids[:, start:]], dim=1)
        embeddings = model.get_input_embeddings()(text).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, position_ids=positions(1)).logits
        (gradient,) = torch.autograd.grad(logits[:, start:].square().sum(), embeddings)
        # Sums of log decays cancel in fp64, up to rounding near 1e-17.
        assert gradient[:, :start].abs().max() < 1e-12 * gradient.abs().max()
        results.append((logits, gradient))
    (logits, gradient), (others_logits, others_gradient) = results
    assert not torch.equal(logits[:, :start], others_logits[:, :start])
    assert torch.equal(logits[:, start:], others_logits[:, start:])
    assert torch.equal(gradient[:, start:], others_gradient[:, start:])


@variants
def test_rows_may_be_packed_differently(variant: str) -> None:
    model, ids = tiny_model(variant), random_ids(2, 40)
    rows = [positions(1), positions(1, (5, 35))]
    logits = model(ids, position_ids=torch.cat(rows)).logits
    for row, own in enumerate(rows):
        alone = model(ids[row : row + 1], position_ids=own).logits
        assert worst_difference(logits[row : row + 1], alone) < TOLERANCE


@variants
def test_positions_that_only_start_later_are_one_document(variant: str) -> None:
    """The rotation depends only on distances; nothing is cut."""
    model, ids = tiny_model(variant, length_scaling_base=None), random_ids(1, 30)
    assert worst_difference(model(ids, position_ids=torch.arange(7, 37)[None]).logits, model(ids).logits) < TOLERANCE


@variants
def test_positions_behind_a_cache_do_not_restart_anything(variant: str) -> None:
    """Explicit position_ids of later tokens, as generate() sends them."""
    model, ids = tiny_model(variant), random_ids(1, 30)
    cache = TransXSSMCache(model.config)
    model(ids[:, :11], position_ids=torch.arange(11)[None], past_key_values=cache)
    logits = model(ids[:, 11:], position_ids=torch.arange(11, 30)[None], past_key_values=cache).logits
    assert worst_difference(logits, model(ids).logits[:, 11:]) < TOLERANCE
