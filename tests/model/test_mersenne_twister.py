"""A generator moved ahead equals torch's own after the same count of numbers."""

import pytest
import torch

from megatron_txssm.model.mersenne_twister import generators_ahead


@pytest.mark.parametrize("start, step", [(0, 1), (1, 623), (624, 625), (19_937, 40_000), (3_000_017, 1)])
def test_a_generator_ahead_gives_what_comes_then(start: int, step: int) -> None:
    seed = -(2**62) + start
    for number, generator in enumerate(generators_ahead(seed, start, step, 3)):
        slow = torch.Generator().manual_seed(seed)
        # One 32-bit draw each.
        torch.empty(start + number * step).uniform_(generator=slow)
        # More than the 624 words that the generator produces at once.
        ahead, expected = (torch.empty(2000).normal_(generator=source) for source in (generator, slow))
        assert torch.equal(ahead, expected), number


def test_another_form_of_torchs_generator_is_not_taken_for_this_one() -> None:
    """A used generator simulates another format."""
    from megatron_txssm.model.mersenne_twister import _advance

    generator = torch.Generator().manual_seed(1)
    torch.empty(16).uniform_(generator=generator)
    with pytest.raises(AssertionError, match="another form"):
        _advance(generator, 1)
