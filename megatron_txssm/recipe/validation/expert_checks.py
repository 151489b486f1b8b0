"""Checks of a recipe's layers of experts. Each error gives name, value and remedy."""

import math

from megatron_txssm.architecture.layer_pattern import EXPERTS
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIELDS
from megatron_txssm.recipe.sizes import divisors

# Without an effect if no layer is one of experts.
_OF_EXPERTS = (
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_aux_loss_coeff",
)


def check_experts(recipe: Recipe) -> None:
    """UserError for the first contradiction of the experts with other fields."""
    if not recipe.has_experts:
        _check_no_experts(recipe)
        return
    model, tensor = recipe.model, recipe.parallel.tensor_model_parallel_size
    count, size = model.num_experts, recipe.parallel.expert_model_parallel_size
    if count is None:
        raise UserError(f"layer_pattern has layers of experts ({EXPERTS}); state num_experts, such as 8")
    if model.moe_router_topk > count:
        raise UserError(
            f"moe_router_topk={model.moe_router_topk} is more than num_experts={count}; use at most {count}"
        )
    if count % size != 0:
        legal = ", ".join(map(str, divisors(count)))
        raise UserError(
            f"num_experts={count} is not divisible by expert_model_parallel_size={size}; use one of {legal}"
        )
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        value = getattr(model, name)
        if value is not None and value % (2 * tensor) != 0:
            raise UserError(
                f"{name}={value} does not leave an even number of channels to each tensor-parallel process, which "
                f"Megatron's SwiGLU warm-up halves; use a multiple of {2 * tensor}"
            )
    if tensor > 1 and not recipe.parallel.sequence_parallel:
        raise UserError(
            f"experts with tensor_model_parallel_size={tensor} need sequence_parallel: true, so that each token is "
            "routed once"
        )
    if recipe.training.fp8 is not None and recipe.training.transformer_impl == "local":
        raise UserError(
            f"training.fp8={recipe.training.fp8} cannot be emulated for experts; set transformer_impl: "
            "transformer_engine (GPU only), or fp8: null"
        )


def _check_no_experts(recipe: Recipe) -> None:
    for name in _OF_EXPERTS:
        value, default = getattr(recipe.model, name), FIELDS["model"][name].default
        if value != default:
            raise UserError(
                f"{name}={value} has no effect, as layer_pattern has no layer of experts; write {EXPERTS} for one, or "
                f"leave {name} out{'' if default is None else f' (default: {default})'}"
            )
    if (size := recipe.parallel.expert_model_parallel_size) > 1:
        raise UserError(
            f"expert_model_parallel_size={size} needs layers of experts ({EXPERTS} in layer_pattern); leave it out"
        )


def check_expert_parallel(recipe: Recipe, data_parallel: int) -> None:
    """UserError if this many copies of the model's layout cannot share the experts."""
    parallel = recipe.parallel
    size, context = parallel.expert_model_parallel_size, parallel.context_parallel_size
    if data_parallel * context % size != 0:
        common = math.gcd(data_parallel * context, recipe.model.num_experts or 1)
        legal = list(map(str, divisors(common)))
        copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        raise UserError(
            f"expert_model_parallel_size={size} does not divide the {data_parallel} data-parallel x {context} "
            f"context-parallel processes; set it to {'' if len(legal) == 1 else 'one of '}{', '.join(legal)}, or start "
            f"a multiple of {copy * math.lcm(context, size)} processes"
        )
