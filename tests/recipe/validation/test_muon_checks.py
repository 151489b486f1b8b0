"""Settings of Muon that have no effect, and what it does not go with: each message names a remedy that works."""

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.session.arguments import megatron_arguments
from tests.support.recipes import TINY

MUON: Changes = {"optimizer.name": "muon", "megatron.mock_data": True}


def refusal(changes: Changes) -> str:
    with pytest.raises(UserError) as caught:
        validate(recipe(changes))
    return str(caught.value)


def recipe(changes: Changes) -> Recipe:
    return changed(TINY, {"megatron.mock_data": True} | changes)


@pytest.mark.parametrize(
    ("field", "value"), [("muon_momentum", 0.9), ("muon_nesterov", False), ("muon_coefficient_type", "aol")]
)
def test_settings_of_muon_need_muon(field: str, value: object) -> None:
    said = refusal({f"optimizer.{field}": value})
    assert said.startswith(f"optimizer.{field}={value!r} has no effect") and "set optimizer.name=muon" in said
    validate(recipe(MUON | {f"optimizer.{field}": value}))


def test_no_distributed_optimizer() -> None:
    said = refusal(MUON | {"parallel.use_distributed_optimizer": True})
    assert said.endswith("set parallel.use_distributed_optimizer=false")
    validate(recipe(MUON))


@pytest.mark.parametrize("entry", ["overlap_param_gather", "use_precision_aware_optimizer", "optimizer_cpu_offload"])
def test_no_entry_that_needs_one(entry: str) -> None:
    changes = MUON | {"model.layer_pattern": "*-*-", f"megatron.{entry}": True}
    assert refusal(changes).endswith(f"set megatron.{entry}=null")
    validate(recipe(changes | {f"megatron.{entry}": None}))


def test_arguments() -> None:
    words = " ".join(megatron_arguments(recipe(MUON | {"optimizer.muon_nesterov": False})))
    assert "--optimizer muon --" in words
    assert (
        "--muon-momentum 0.95 --muon-num-ns-steps 5 --muon-coefficient-type quintic --muon-scale-mode spectral "
        "--muon-extra-scale-factor 0.2 --muon-fp32-matmul-prec medium --muon-tp-mode duplicated" in words
    )
    assert "--muon" not in " ".join(megatron_arguments(recipe({})))
