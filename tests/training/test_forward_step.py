"""The samples that training reads: where a token has a loss, and that none is another than in the data."""

from typing import Any

import pytest
import torch
from megatron.training import get_tokenizer
from megatron.training.global_vars import rebuild_tokenizer

from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.session.start import megatron_initialized
from megatron_txssm.training.forward_step import datasets_provider
from tests.support.tiny_run import VOCAB_SIZE, TinyRun

END_OF_DOCUMENT = VOCAB_SIZE - 1


def samples(tiny: TinyRun, *fields: str, pad: int | None = None) -> dict[str, torch.Tensor]:
    """Sixteen training samples as one batch; `pad`: the id of the tokenizer's padding."""
    with megatron_initialized(load_recipe(tiny.recipe, fields), 1) as args:
        if pad is not None:
            args.null_tokenizer_pad_id = pad
            rebuild_tokenizer(args)
            tokenizer: Any = get_tokenizer()
            assert tokenizer.pad == pad
        train = datasets_provider([16, 1, 1])[0]
        return {key: torch.stack([train[index][key] for index in range(16)]) for key in train[0]}


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_masked_where_the_end_of_a_document_is_read(tiny: TinyRun, masked: bool) -> None:
    batch = samples(tiny, f"training.mask_end_of_document={str(masked).lower()}")
    ends = batch["tokens"] == END_OF_DOCUMENT
    assert 0 < ends.sum() < ends.numel()
    expected = ~ends if masked else torch.ones_like(ends)
    assert torch.equal(batch["loss_mask"].bool(), expected)
    # The model is still taught where a document ends.
    assert (batch["labels"][batch["loss_mask"].bool()] == END_OF_DOCUMENT).any()


def test_a_token_of_the_paddings_id_is_text(tiny: TinyRun) -> None:
    plain, padded = samples(tiny), samples(tiny, pad=5)
    assert (plain["tokens"] == 5).any()
    for key, expected in plain.items():
        assert torch.equal(padded[key], expected), key
