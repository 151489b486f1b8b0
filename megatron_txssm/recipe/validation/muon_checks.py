"""Checks of a recipe's optimizer: settings of Muon that have no effect, and what Muon does not go with."""

from megatron_txssm.errors import UserError, shown
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIELDS

# Entries of the `megatron:` section that need a distributed optimizer, which Muon has none of.
_OF_DISTRIBUTED_OPTIMIZERS = (
    *("overlap_param_gather", "use_precision_aware_optimizer", "fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"),
    *("optimizer_cpu_offload", "ddp_reduce_scatter_with_fp32_accumulation"),
)

_OF_MUON = {name: field for name, field in FIELDS["optimizer"].items() if name.startswith("muon_")}


def check_muon(recipe: Recipe) -> None:
    """UserError for the first setting that would be dropped without Muon, or that Muon would fail on."""
    if recipe.optimizer.name != "muon":
        _check_no_muon(recipe)
        return
    if recipe.parallel.use_distributed_optimizer:
        raise UserError(
            "optimizer.name=muon orthogonalizes whole matrices, which parallel.use_distributed_optimizer=true divides "
            "over data parallelism; set parallel.use_distributed_optimizer=false"
        )
    for name in _OF_DISTRIBUTED_OPTIMIZERS:
        if recipe.megatron.get(name):
            raise UserError(
                f"megatron.{name}={shown(recipe.megatron[name])} needs a distributed optimizer, which optimizer.name="
                f"muon does not have; set megatron.{name}=null"
            )


def _check_no_muon(recipe: Recipe) -> None:
    for name, field in _OF_MUON.items():
        if (value := getattr(recipe.optimizer, name)) != field.default:
            raise UserError(
                f"optimizer.{name}={shown(value)} has no effect with optimizer.name=adam; set optimizer.name=muon, or "
                "leave it out"
            )
