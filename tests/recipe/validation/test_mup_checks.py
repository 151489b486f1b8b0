"""muP: its arguments, and what it does not go with."""

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.session.arguments import megatron_arguments
from tests.support.recipes import TINY

MUP = changed(TINY, {"megatron.mock_data": True, "model.mup_base_hidden_size": 16})


def test_muon_has_updates_of_its_own() -> None:
    validate(MUP)
    muon = changed(MUP, {"optimizer.name": "muon"})
    with pytest.raises(
        UserError, match=r"^model\.mup_base_hidden_size=16 .*; set model\.mup_base_hidden_size=null, or"
    ):
        validate(muon)
    validate(changed(muon, {"model.mup_base_hidden_size": None}))


def test_arguments() -> None:
    assert "--use-mup --mup-base-hidden-size 16 --mup-attn-scale-power 0.5 --" in " ".join(megatron_arguments(MUP))
    assert "-mup" not in " ".join(megatron_arguments(changed(MUP, {"model.mup_base_hidden_size": None})))


@pytest.mark.parametrize(("base", "multiplier"), [(None, 1.0), (32, 1.0), (8, 0.25), (48, 1.5)])
def test_factor_of_the_logits(base: int | None, multiplier: float) -> None:
    assert changed(MUP, {"model.mup_base_hidden_size": base}).sizes.logits_multiplier == multiplier
