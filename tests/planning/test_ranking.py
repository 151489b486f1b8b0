"""The planner's ranking: order, limit, when it recomputes, and the nearest answers to impossible requests."""

import dataclasses

import pytest

from megatron_txssm.architecture.gpus import GIB, GPUS
from megatron_txssm.planning.layouts import Layout
from megatron_txssm.planning.nearest import answer
from megatron_txssm.planning.ranking import Estimates, estimated_usage, rank_layouts
from megatron_txssm.planning.rates import Cluster
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.validation.validate import validate

H100 = next(gpu for gpu in GPUS if gpu.name == "h100-sxm")
CLUSTER = Cluster(H100, 8)
LIMIT = 72 * GIB


def test_the_fastest_that_fits_is_first() -> None:
    ranking = rank_layouts(load_recipe("transxssm_1.3b"), 8, CLUSTER, LIMIT)
    times = [plan.time.total for plan in ranking.fitting]
    assert times == sorted(times) and len(times) > 100
    assert all(plan.memory.peak <= LIMIT for plan in ranking.fitting)
    assert all(plan.memory.peak > LIMIT for plan in ranking.too_large)


def test_a_small_model_on_one_node_is_data_parallel_alone() -> None:
    best = rank_layouts(load_recipe("transxssm_320m"), 8, CLUSTER, LIMIT).best
    assert best is not None
    assert (best.layout.tensor, best.layout.pipeline, best.layout.context, best.layout.data) == (1, 1, 1, 8)


def test_a_slow_network_favours_layouts_that_use_it_less() -> None:
    recipe = load_recipe("transxssm_1.3b", ["megatron.overlap_grad_reduce=null", "megatron.overlap_param_gather=null"])
    slow = Cluster(dataclasses.replace(H100, network_bandwidth=H100.network_bandwidth / 1000), 8)
    fast_best, slow_best = (rank_layouts(recipe, 16, cluster, LIMIT).best for cluster in (CLUSTER, slow))
    assert fast_best is not None and slow_best is not None
    assert fast_best.layout.tensor * fast_best.layout.pipeline == 1
    # Each GPU then has fewer gradients to send to the other node.
    assert slow_best.layout.tensor * slow_best.layout.pipeline > 1


def test_recomputation_is_planned_only_where_nothing_else_fits() -> None:
    recipe = load_recipe("transxssm_1.3b")
    limit = 30 * GIB
    ranking = rank_layouts(recipe, 8, CLUSTER, limit)
    estimates = Estimates(recipe, CLUSTER)
    recomputing = [plan for plan in ranking.fitting if plan.layout.recompute == "full"]
    assert recomputing
    for plan in recomputing:
        assert estimates.plan(dataclasses.replace(plan.layout, recompute="none")).memory.peak > limit


def test_throughput_and_mfu_follow_from_the_step() -> None:
    plan = Estimates(load_recipe("transxssm_1.3b"), CLUSTER).plan(Layout(data=8, micro_batch=2))
    assert plan.tokens_per_second == pytest.approx(2_097_152 / plan.time.total)
    # 8.1 GFLOPs a token, as training logs count them (docs/gpu-results).
    assert plan.mfu == pytest.approx(8_103_002_112 * plan.tokens_per_second / (8 * 989e12))


def test_the_worst_stage_is_the_one_with_the_largest_peak() -> None:
    recipe = load_recipe("transxssm_1.3b")
    layout = Layout(pipeline=4, data=2, micro_batch=2)
    plan = Estimates(recipe, CLUSTER).plan(layout)
    peaks = [estimated_usage(layout.of(recipe), 8, rank).peak for rank in range(4)]
    assert peaks[plan.worst] == max(peaks) == plan.memory.peak


def test_a_plan_for_4096_gpus() -> None:
    recipe = load_recipe("transxssm_320m_moe")
    ranking = rank_layouts(recipe, 4096, CLUSTER, LIMIT)
    assert ranking.best is not None and ranking.refused
    assert ranking.best.layout.gpus == 4096
    validate(ranking.best.layout.of(recipe), 4096)


def test_five_gpus_with_four_tensor_parallel_ranks_become_four() -> None:
    fixed = {"parallel.tensor_model_parallel_size": 4}
    found = answer(load_recipe("transxssm_1.3b"), 5, CLUSTER, LIMIT, fixed)
    assert found.gpus == 4
    assert found.ranking.best is not None and found.ranking.best.layout.tensor == 4
    assert found.problem == ("no layout is legal on 5 GPUs: 5 GPUs cannot be divided by tensor_model_parallel_size=4")


def test_small_gpus_need_more_of_them() -> None:
    recipe = load_recipe("transxssm_1.3b")
    found = answer(recipe, 8, CLUSTER, GIB)
    assert found.gpus > 8
    assert found.ranking.best is not None and found.ranking.best.memory.peak <= GIB
    assert "nothing fits on 8 GPUs" in found.problem


def test_the_least_memory_is_the_answer_if_nothing_ever_fits() -> None:
    found = answer(load_recipe("transxssm_1.3b"), 8, CLUSTER, 0.01 * GIB)
    assert found.gpus == 8
    assert found.ranking.best is None
    assert found.ranking.smallest is not None
    assert found.ranking.smallest.layout.name in found.problem


def test_a_request_that_can_be_met_has_no_problem() -> None:
    assert answer(load_recipe("transxssm_1.3b"), 8, CLUSTER, LIMIT).problem == ""


def test_traffic_grows_with_the_steps_micro_batches() -> None:
    recipe = load_recipe("transxssm_1.3b")
    layout = Layout(tensor=2, sequence_parallel=True, data=8, micro_batch=2)
    double = changed(recipe, {"training.global_batch_tokens": 2 * recipe.training.global_batch_tokens})
    one, two = (estimated_usage(layout.of(each), 16, 0).traffic for each in (recipe, double))
    assert two["all_gather", "tp"] == 2 * one["all_gather", "tp"]
    assert two["reduce_scatter", "dp"] == one["reduce_scatter", "dp"]
