"""The planner's layouts: all that the recipe's validation accepts, no other, and why each other one is refused."""

import itertools
from typing import Any

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.planning.layouts import MICRO_BATCHES, Layout, candidates, layout_of
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate
from tests.support.recipes import TINY

MOCK: Changes = {"megatron.mock_data": True}
EXPERTS: Changes = {"model.layer_pattern": "ME*E", "model.num_experts": 4, "model.moe_ffn_hidden_size": 16}


def recipe(**more: Any) -> Recipe:
    return changed(TINY, MOCK | more)


def is_legal(layout: Layout, planned: Recipe) -> bool:
    try:
        validate(layout.of(planned), layout.gpus)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("changes", [{}, {"model.layer_pattern": "M-M-M-*-"}, EXPERTS], ids=["4", "8", "experts"])
@pytest.mark.parametrize("gpus", [1, 2, 4, 6])
def test_candidates_are_all_that_validation_accepts(gpus: int, changes: Changes) -> None:
    planned = changed(TINY, MOCK | changes)
    expected = set()
    sizes = range(1, gpus + 1)
    for tensor, pipeline, context, virtual in itertools.product(sizes, sizes, sizes, (1, 2, 3, 4)):
        if gpus % (tensor * pipeline * context) or (pipeline == 1 < virtual):
            continue
        # A stage of one layer is legal only without virtual stages.
        if virtual > 1 and len(planned.layers) // (pipeline * virtual) < 2:
            continue
        data = gpus // (tensor * pipeline * context)
        methods = ("state_passing", "all_to_all") if context > 1 else ("state_passing",)
        for micro, method, expert in itertools.product(MICRO_BATCHES, methods, (1, 2, 4)):
            layout = Layout(
                tensor=tensor,
                pipeline=pipeline,
                virtual=virtual,
                context=context,
                expert=expert,
                data=data,
                sequence_parallel=tensor > 1,
                state_context=method,
                micro_batch=micro,
            )
            if is_legal(layout, planned):
                expected.add(layout)
    assert set(candidates(planned, gpus, 8).legal) == expected


def test_a_layout_is_what_its_recipe_states() -> None:
    for layout in candidates(recipe(), 4, 8).legal:
        assert layout_of(layout.of(recipe()), 4) == layout


def test_names_are_unique_and_readable() -> None:
    legal = candidates(recipe(), 4, 8).legal
    assert len({layout.name for layout in legal}) == len(legal)
    assert Layout(2, 4, 3, 1, 1, 8, True, micro_batch=1, recompute="full").name == "tp2_sp_pp4_vpp3_dp8_zero1_full_mb1"


def test_tensor_parallelism_stays_within_a_node() -> None:
    found = candidates(recipe(), 4, 1)
    assert {layout.tensor for layout in found.legal} == {1}
    assert any("within nodes of 1" in refused.reason for refused in found.refused)
    # All GPUs of one node need no division of it.
    assert 2 in {layout.tensor for layout in candidates(recipe(), 2, 3).legal}


def test_fixed_fields_keep_their_values() -> None:
    fixed = {
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": False,
        "parallel.use_distributed_optimizer": False,
        "parallel.recompute": "full",
        "training.micro_batch_size": 1,
    }
    legal = candidates(recipe(), 4, 8, fixed).legal
    assert legal
    for layout in legal:
        assert {name: layout.changes[name] for name in fixed} == fixed


def test_a_refused_layout_has_its_reason() -> None:
    found = candidates(recipe(), 5, 8, {"parallel.tensor_model_parallel_size": 4})
    assert not found.legal
    assert [refused.reason for refused in found.refused] == ["5 GPUs cannot be divided by tensor_model_parallel_size=4"]


def test_overlap_of_tensor_parallelism_needs_some() -> None:
    legal = candidates(load_recipe("transxssm_1.3b_tp2_h100"), 8, 8).legal
    assert legal and all(layout.tensor > 1 for layout in legal)


def test_the_reason_is_that_of_the_first_axis_which_contradicts() -> None:
    found = candidates(load_recipe("transxssm_320m"), 8, 8)
    # state_num_groups is 4; nothing is divided further.
    (refused,) = [refused for refused in found.refused if refused.layout.tensor == 8]
    assert "state_num_groups=4" in refused.reason or "num_attention_heads=12" in refused.reason
    assert refused.layout.pipeline == refused.layout.context == refused.layout.data == 1
