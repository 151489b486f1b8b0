"""The planner's traffic against bytes that dry runs of the real model counted, and small cases computed by hand."""

import pytest

from megatron_txssm.planning.layouts import Layout, layout_of
from megatron_txssm.planning.share import pipeline_stages, share_of
from megatron_txssm.planning.traffic import layer_calls, traffic_of
from megatron_txssm.recipe.loader import load_recipe

MIB = 2**20


def traffic(name: str, changes: list[str], gpus: int, rank: int, micro_batches: int) -> dict[tuple[str, str], float]:
    """MiB by (collective, group)."""
    recipe = load_recipe(name, [f"parallel.{change}" for change in changes])
    layout = layout_of(recipe, gpus)
    stage = pipeline_stages(recipe, layout.pipeline, layout.virtual).of_rank[rank]
    found = traffic_of(share_of(recipe, layout), layout, stage, rank, micro_batches)
    return {key: size / MIB for key, size in found.items()}


def test_tensor_parallelism_as_a_dry_run_counted_it() -> None:
    found = traffic(
        "transxssm_1.3b", ["tensor_model_parallel_size=2", "sequence_parallel=true"], gpus=2, rank=0, micro_batches=1
    )
    # 147 and 98 calls of 8192 tokens x 2048 channels in bf16.
    assert found["all_gather", "tp"] == 4704
    assert found["reduce_scatter", "tp"] == 3136
    assert set(found) == {("all_gather", "tp"), ("reduce_scatter", "tp"), ("all_reduce", "tp")}


def test_context_parallelism_as_dry_runs_counted_it() -> None:
    passing = traffic("transxssm_1.3b", ["context_parallel_size=2"], gpus=2, rank=0, micro_batches=1)
    assert passing["all_gather", "cp"] == passing["reduce_scatter", "cp"] == pytest.approx(168.02, abs=0.01)
    assert passing["reduce_scatter", "dp_cp"] == pytest.approx(4982.64, abs=0.01)
    assert passing["all_gather", "dp_cp"] == pytest.approx(2491.33, abs=0.02)
    changes = ["context_parallel_size=2", "state_context_parallel=all_to_all"]
    exchanged = traffic("transxssm_1.3b", changes, gpus=2, rank=0, micro_batches=1)
    assert exchanged["all_to_all", "cp"] == 2037
    assert ("all_gather", "cp") not in exchanged


def test_an_exchange_of_heads_is_five_calls_a_pass() -> None:
    changes = ["parallel.context_parallel_size=2", "parallel.state_context_parallel=all_to_all"]
    recipe = load_recipe("transxssm_1.3b", changes)
    forward, backward = layer_calls(share_of(recipe, layout_of(recipe, 2)), "M")
    # x and y, B and C, dt.
    assert sum(call.count for call in forward) == sum(call.count for call in backward) == 5


def test_all_axes_as_a_dry_run_counted_them() -> None:
    changes = [
        "tensor_model_parallel_size=4",
        "sequence_parallel=true",
        "pipeline_model_parallel_size=2",
        "context_parallel_size=2",
    ]
    found = traffic("transxssm_1.3b", changes, gpus=64, rank=0, micro_batches=4)
    counted = {
        ("all_gather", "tp"): 4672,
        ("reduce_scatter", "tp"): 3136,
        ("all_gather", "cp"): 88.01,
        ("reduce_scatter", "cp"): 88.01,
        ("send_recv", "pp"): 32,
        ("reduce_scatter", "dp_cp"): 672.19,
        ("all_gather", "dp_cp"): 336.10,
        ("all_reduce", "embedding"): 98.25,
    }
    for key, expected in counted.items():
        assert found[key] == pytest.approx(expected, abs=0.01), key


def test_experts_under_tensor_parallelism_as_a_dry_run_counted_them() -> None:
    changes = [
        *("tensor_model_parallel_size=2", "sequence_parallel=true", "expert_model_parallel_size=2"),
        "use_distributed_optimizer=true",
    ]
    changes = [*(f"parallel.{change}" for change in changes), "training.micro_batch_size=2"]
    recipe = load_recipe("transxssm_320m_moe", changes)
    layout = layout_of(recipe, 4)
    [stage] = pipeline_stages(recipe, 1, 1).of_rank
    found = traffic_of(share_of(recipe, layout), layout, stage, 0, micro_batches=64)
    # Results are summed in fp32: a reduction forward and a gather backward have twice the bytes.
    counted = {("all_gather", "tp"): 334272, ("reduce_scatter", "tp"): 296640, ("all_to_all", "ep"): 147648}
    assert {key: found[key] / MIB for key in counted} == counted


def test_gradients_of_norms_and_routers_as_dry_runs_counted_them() -> None:
    stages = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4, "sequence_parallel": "true"}
    changes = [f"{name}={value}" for name, value in stages.items()]
    # In fp32: 40 norms of 8,192 channels, nothing of the loss.
    assert traffic("llama3_70b", changes, 64, 1, 1)["all_reduce", "tp"] * MIB == 1310720
    changes = [
        *("tensor_model_parallel_size=2", "sequence_parallel=true", "expert_model_parallel_size=2"),
        "use_distributed_optimizer=true",
    ]
    # 49 norms and 24 routers of 32 experts; the loss of 64 micro-batches of 4,096 tokens.
    routers = traffic("transxssm_320m_moe", changes, 4, 0, 64)["all_reduce", "tp"] * MIB
    assert (
        routers
        == (49 + 24 * 32) * 768 * 4 + 64 * 3 * 4096 * 4 * load_recipe("transxssm_320m_moe").training.micro_batch_size
    )


def test_transfers_between_stages() -> None:
    changes = ["pipeline_model_parallel_size=4"]
    # 16 MiB·2 of activations for each of 8 micro-batches: received and sent, forward and backward.
    assert traffic("transxssm_1.3b", changes, 4, 1, 8)["send_recv", "pp"] == 1024
    assert traffic("transxssm_1.3b", changes, 4, 0, 8)["send_recv", "pp"] == 512
    interleaved = [*changes, "virtual_pipeline_stages=3"]
    # Rank 0 receives for two of its three stages and sends for all of them.
    assert traffic("transxssm_1.3b", interleaved, 4, 0, 8)["send_recv", "pp"] == 5 * 512


def test_full_recomputation_repeats_the_forward_pass() -> None:
    changes = ["tensor_model_parallel_size=2", "sequence_parallel=true", "recompute=full"]
    found = traffic("transxssm_1.3b", changes, gpus=2, rank=0, micro_batches=1)
    # One gather and one scatter more for each of 48 layers.
    assert found["all_gather", "tp"] == 4704 + 48 * 32
    assert found["reduce_scatter", "tp"] == 3136 + 48 * 32


def test_without_zero1_gradients_are_reduced_whole() -> None:
    found = traffic("transxssm_1.3b", ["use_distributed_optimizer=false"], gpus=8, rank=0, micro_batches=1)
    assert list(found) == [("all_reduce", "dp")]
    assert found["all_reduce", "dp"] == pytest.approx(4982.64, abs=0.01)


def test_tokens_travel_to_their_experts_and_back() -> None:
    recipe = load_recipe("transxssm_320m_moe", ["training.micro_batch_size=1"])
    layout = Layout(expert=8, data=8, micro_batch=1)
    (stage,) = pipeline_stages(recipe, 1, 1).of_rank
    found = traffic_of(share_of(recipe, layout), layout, stage, 0, 1)
    # 4096 tokens to 4 experts each: hidden states of 768 in bf16 there and back, their probabilities there; twice.
    assert found["all_to_all", "ep"] == 24 * 2 * (4096 * 4 * 768 * 2 * 2 + 4096 * 4 * 4)
    # All of the data-parallel ranks share them, so none has the same ones.
    assert not [group for _, group in found if group == "expert_dp"]
