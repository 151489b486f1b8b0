"""The planner's step time: against an H100's, and the pipeline's and data parallelism's parts by hand."""

import dataclasses

import pytest

from megatron_txssm.architecture.gpus import GPUS, Gpu
from megatron_txssm.home import HOME
from megatron_txssm.planning.layouts import Layout, layout_of
from megatron_txssm.planning.rates import RATES, Cluster, group_shape
from megatron_txssm.planning.share import pipeline_stages, share_of
from megatron_txssm.planning.step_time import Overlaps, StepTime, step_time
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe

H100 = next(gpu for gpu in GPUS if gpu.name == "h100-sxm")
NO_OVERLAP = Overlaps(gradients=False, weights=False, tensor=False)


def timed(
    recipe: Recipe, layout: Layout, micro_batches: int, gpu: Gpu = H100, overlaps: Overlaps = NO_OVERLAP
) -> StepTime:
    stages = pipeline_stages(recipe, layout.pipeline, layout.virtual)
    return step_time(share_of(recipe, layout), Cluster(gpu, 8), layout, stages, micro_batches, overlaps)


# Recipe, micro-batch, tokens/s of two micro-batches and the optimizer as one CUDA graph: docs/gpu-results.
@pytest.mark.parametrize(
    ("name", "micro_batch", "measured"),
    [
        ("transxssm_1.3b", 2, 50_700),
        ("transxssm_1.3b", 1, 45_000),
        ("llama3_1.3b", 2, 49_000),
        ("transxssm_320m", 4, 145_500),
        ("llama3_320m", 4, 144_000),
    ],
)
def test_speed_measured_on_one_h100(name: str, micro_batch: int, measured: float) -> None:
    recipe = load_recipe(name, [f"training.micro_batch_size={micro_batch}"])
    seconds = timed(recipe, layout_of(recipe, 1), micro_batches=2).total
    tokens = 2 * micro_batch * recipe.training.seq_length
    assert tokens / seconds == pytest.approx(measured, rel=0.07)


@pytest.mark.parametrize("virtual", [1, 2])
def test_the_bubble_of_equal_stages(virtual: int) -> None:
    # Without the ends, which have the embedding and the LM head, all stages are equal.
    recipe = load_recipe("mamba2_1.3b", ["data.vocab_size=128"])
    free = dataclasses.replace(H100, node_bandwidth=1e30, network_bandwidth=1e30)
    time = timed(recipe, Layout(pipeline=4, virtual=virtual, micro_batch=1), micro_batches=8, gpu=free)
    passes = time.compute + time.exchange
    assert time.bubble / passes == pytest.approx(3 / (8 * virtual), rel=0.02)


def test_passes_hide_data_parallelism_where_megatron_overlaps_it() -> None:
    recipe = load_recipe("transxssm_1.3b")
    layout = Layout(data=8, micro_batch=2)
    bare = timed(recipe, layout, 2)
    hidden = timed(recipe, layout, 2, overlaps=Overlaps(gradients=True, weights=True, tensor=False))
    assert hidden.data == 0 < bare.data
    # A reduce-scatter of 4 bytes and an all-gather of 2 a parameter, 7/8 of them over NVLink at 0.8 of 450 GB/s.
    assert bare.data == pytest.approx(1_306_168_640 * 6 * 7 / 8 / (0.8 * 450e9), rel=0.01)


def test_halving_the_gpus_products_doubles_a_large_step() -> None:
    recipe = load_recipe("transxssm_1.3b")
    slow = dataclasses.replace(H100, bf16_flops=H100.bf16_flops / 2, memory_bandwidth=H100.memory_bandwidth / 2)
    assert timed(recipe, Layout(micro_batch=2), 2, gpu=slow).total == pytest.approx(
        2 * timed(recipe, Layout(micro_batch=2), 2).total, rel=0.03
    )


def test_recomputation_repeats_forward_passes() -> None:
    recipe = load_recipe("transxssm_1.3b")
    once = timed(recipe, Layout(micro_batch=2), 2).compute
    again = timed(recipe, Layout(micro_batch=2, recompute="full"), 2).compute
    # A third of all products, without the LM head's, of which Megatron repeats none.
    assert 1.2 < again / once < 1.33


def test_collectives_within_a_node_and_between_nodes() -> None:
    cluster, size = Cluster(H100, 8), 8e9
    inside = cluster.collective_seconds("all_gather", size, members=8, stride=1)
    assert inside == pytest.approx(7 / 8 * size / (0.8 * 450e9), rel=0.01)
    assert cluster.collective_seconds("all_reduce", size, 8, 1) == pytest.approx(2 * inside, rel=0.01)
    # One GPU of each of eight nodes: its own adapter alone.
    between = cluster.collective_seconds("all_gather", size, members=8, stride=8)
    assert between == pytest.approx(7 / 8 * size / (0.8 * 50e9), rel=0.01)
    # All GPUs of two nodes: eight adapters.
    assert cluster.collective_seconds("all_gather", size, 16, 1) == pytest.approx(
        15 / 16 * size / (0.8 * 400e9), rel=0.01
    )
    # Half of what all 16 exchange stays within the node.
    assert cluster.collective_seconds("all_to_all", size, 16, 1) == pytest.approx(size / 2 / (0.8 * 50e9), rel=0.01)
    assert cluster.collective_seconds("all_gather", size, members=1, stride=1) == 0

    # 8 and 64 nodes: three and six doublings.
    far, farther = (cluster.collective_seconds("all_gather", 1, members=nodes, stride=8) for nodes in (8, 64))
    assert farther == pytest.approx(2 * far, rel=1e-3)


def test_groups_of_megatrons_order_of_ranks() -> None:
    shapes = {
        group: group_shape(group, 2, 4, data=8, expert=16, pipeline=3)
        for group in ("tp", "cp", "dp", "ep", "expert_dp", "pp", "embedding")
    }
    assert shapes == {
        "tp": (2, 1),
        "cp": (4, 2),
        "dp": (32, 2),
        "ep": (16, 2),
        "expert_dp": (2, 32),
        "pp": (3, 64),
        "embedding": (2, 64),
    }


def test_the_document_has_every_rate() -> None:
    text = (HOME / "docs" / "planner.md").read_text()
    for rate in RATES:
        assert f"| {rate.meaning} | {rate.value:g} | {rate.source} |" in text
