"""Layers of experts in recipes: contradictions are refused by value, and what the refusal advises is accepted."""

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate

EXPERTS = ("model.layer_pattern=ME*E", "model.num_experts=4")
ONE_PROCESS = ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
TENSOR_2 = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
FP8 = ("training.fp8=hybrid", "training.precision=bf16")


@pytest.mark.parametrize(
    ("overrides", "wanted", "remedy"),
    [
        (
            ["model.layer_pattern=ME*E"],
            "layer_pattern has layers of experts (E); state num_experts, such as 8",
            {"model.num_experts": 8},
        ),
        (
            [*EXPERTS, "model.moe_router_topk=5"],
            "moe_router_topk=5 is more than num_experts=4; use at most 4",
            {"model.moe_router_topk": 4},
        ),
        (
            [*EXPERTS, "model.num_experts=6", "parallel.expert_model_parallel_size=4"],
            "num_experts=6 is not divisible by expert_model_parallel_size=4; use one of 1, 2, 3, 6",
            {"parallel.expert_model_parallel_size": 3},
        ),
        (
            [*EXPERTS, "model.moe_ffn_hidden_size=66"],
            "moe_ffn_hidden_size=66 does not leave an even number of channels to each tensor-parallel process, which "
            "Megatron's SwiGLU warm-up halves; use a multiple of 4",
            {"model.moe_ffn_hidden_size": 68},
        ),
        (
            [*EXPERTS, *ONE_PROCESS, "model.moe_shared_expert_intermediate_size=33"],
            "moe_shared_expert_intermediate_size=33 does not leave an even number of channels to each tensor-parallel "
            "process, which Megatron's SwiGLU warm-up halves; use a multiple of 2",
            {"model.moe_shared_expert_intermediate_size": 34},
        ),
        (
            [*EXPERTS, "parallel.sequence_parallel=false"],
            "experts with tensor_model_parallel_size=2 need sequence_parallel: true, so that each token is routed once",
            {"parallel.sequence_parallel": True},
        ),
        (
            [*EXPERTS, *FP8],
            "training.fp8=hybrid cannot be emulated for experts; set transformer_impl: transformer_engine (GPU only), "
            "or fp8: null",
            {"training.transformer_impl": "transformer_engine"},
        ),
        ([*EXPERTS, *FP8], "or fp8: null", {"training.fp8": None}),
        *(
            (
                [f"model.{name}=8"],
                f"{name}=8 has no effect, as layer_pattern has no layer of experts; write E for one, or leave {name} "
                "out",
                {f"model.{name}": None},
            )
            for name in ("num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        ),
        *(
            (
                [f"model.{name}={value}"],
                f"{name}={value} has no effect, as layer_pattern has no layer of experts; write E for one, or leave "
                f"{name} out (default: {default})",
                {f"model.{name}": default},
            )
            for name, value, default in (("moe_router_topk", 4, 2), ("moe_aux_loss_coeff", 0.3, 0.01))
        ),
        (["model.num_experts=8"], "write E for one", {"model.layer_pattern": "ME"}),
        (
            ["parallel.expert_model_parallel_size=2"],
            "expert_model_parallel_size=2 needs layers of experts (E in layer_pattern); leave it out",
            {"parallel.expert_model_parallel_size": 1},
        ),
    ],
)
def test_a_contradiction_names_value_and_remedy(overrides: list[str], wanted: str, remedy: dict[str, object]) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("demo_cpu", [*TENSOR_2, *overrides])
    assert wanted in str(error.value)
    words = [f"{name}={'null' if value is None else value}" for name, value in remedy.items()]
    repaired = load_recipe("demo_cpu", [*TENSOR_2, *overrides, *words])
    assert repaired == changed(repaired, remedy)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        # The only one's weight would be 1 whatever the router says.
        ("model.moe_router_topk=1", "moe_router_topk=1 must be at least 2"),
        ("model.num_experts=1", "num_experts=1 must be at least 2"),
        ("model.moe_aux_loss_coeff=-0.1", "moe_aux_loss_coeff=-0.1 must be at least 0"),
    ],
)
def test_sizes_have_limits(override: str, wanted: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe("demo_cpu", [*EXPERTS, override])
    assert wanted in str(error.value)


def sharing(experts: int, *overrides: str) -> Recipe:
    """A recipe whose batch every number of processes divides."""
    batch = ("training.global_batch_tokens=6144", "training.micro_batch_size=1")
    sizes = ("model.num_experts=12", f"parallel.expert_model_parallel_size={experts}")
    return load_recipe("demo_cpu", [*EXPERTS, *ONE_PROCESS, *batch, *sizes, *overrides])


def test_only_data_and_context_parallel_processes_share_experts() -> None:
    validate(sharing(4), world_size=4)
    validate(sharing(4), world_size=8)
    validate(sharing(4, "parallel.context_parallel_size=2"), world_size=4)
    # A tensor-parallel process has a part of every expert of its own.
    with pytest.raises(UserError, match="does not divide the 2 data-parallel x 1 context-parallel processes") as error:
        validate(sharing(4, *TENSOR_2), world_size=4)
    assert str(error.value).startswith("expert_model_parallel_size=4 ")
    assert str(error.value).endswith("; set it to one of 1, 2, or start a multiple of 8 processes")
    validate(sharing(4, *TENSOR_2), world_size=8)
    validate(sharing(2, *TENSOR_2), world_size=4)
    with pytest.raises(UserError, match=r"divide the 3 data-parallel x 2 context-.*; set it to one of 1, 2, 3, 6, or"):
        validate(sharing(4, "parallel.context_parallel_size=2"), world_size=6)
    for size in (2, 3, 6):
        validate(sharing(size, "parallel.context_parallel_size=2"), world_size=6)
    # One process, such as that of an evaluation.
    with pytest.raises(UserError, match=r"; set it to 1, or start a multiple of 4 processes$"):
        validate(sharing(4), world_size=1)
    # Three cannot share ten experts.
    with pytest.raises(UserError, match=r"; set it to 1, or start a multiple of 2 processes$"):
        validate(sharing(2, "model.num_experts=10"), world_size=3)
    # Whole copies of the model.
    with pytest.raises(UserError, match=r"; set it to one of 1, 2, 4, or start a multiple of 6 processes$"):
        validate(sharing(3, "parallel.context_parallel_size=2"), world_size=4)
    validate(sharing(3, "parallel.context_parallel_size=2"), world_size=6)
