"""The spec of a layer of experts: Megatron's, with a norm of its own."""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayerSubmodules


def experts_layer(config: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """norm → router and experts → residual. The norm is not fused: the router reads its output, too."""
    # Megatron annotates this as a class, but accepts a function.
    add_residual: Any = get_bias_dropout_add
    # Grouped GEMMs are Transformer Engine's; the local backend computes one expert after another.
    build = get_moe_module_spec_for_backend(
        backend, num_experts=config.num_moe_experts, moe_grouped_gemm=backend.fuse_layernorm_and_linear()
    )

    def build_experts(*args: Any, **kwargs: Any) -> Any:
        layer: Any = build(*args, **kwargs)
        for weight in layer.experts.parameters():
            # Their gradients and optimizer are apart from the other weights' even without expert parallelism, so that
            # a checkpoint of one layout has the optimizers of every other.
            weight.allreduce = False
        return layer

    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=backend.layer_norm(rms_norm=True),
            mlp=build_experts,
            mlp_bda=add_residual,
        ),
    )
