"""What a checkpoint's recipe becomes where one process without a GPU loads it."""

from megatron_txssm.checkpoint.load import one_process_recipe
from megatron_txssm.checkpoint.worker import WITHOUT_DATA
from megatron_txssm.recipe.megatron_args import megatron_arguments

CLUSTER = (
    "parallel.tensor_model_parallel_size=4",
    "parallel.sequence_parallel=true",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.virtual_pipeline_stages=3",
    "megatron.tp_comm_overlap=true",
    "megatron.--nccl-ub=true",
    "megatron.recompute_modules=[core_attn]",
)


def test_what_only_a_cluster_needs_is_left_out() -> None:
    recipe = one_process_recipe("transxssm_1.3b", (*CLUSTER, *WITHOUT_DATA))
    parallel = recipe.parallel
    assert parallel.tensor_model_parallel_size == parallel.pipeline_model_parallel_size == 1
    assert parallel.virtual_pipeline_stages is None and not parallel.sequence_parallel
    words = megatron_arguments(recipe)
    assert not [word for word in words if "overlap" in word or "comm" in word or "nccl" in word]
    assert words[words.index("--transformer-impl") + 1] == "local"
    assert words[words.index("--recompute-modules") + 1] == "core_attn", "the rest of the section stays"
    # What the model computes is the recipe's.
    assert recipe.model == one_process_recipe("transxssm_1.3b").model
