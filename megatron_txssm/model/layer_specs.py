"""TransXSSM's layers as a spec of Megatron-Core's HybridModel: how the model registers with Megatron.

Megatron imports `transxssm_stack_spec` by name (`--spec megatron_txssm.model.layer_specs transxssm_stack_spec`) and
builds it with the model's config. The result is an ordinary HybridModel whose state-space layers hold our mixer and
whose attention layers rotate by the same table. Stock Megatron-LM's pretrain_hybrid.py accepts it unchanged; stock.py
adds our arguments to that script.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.training import get_args

from megatron_txssm.architecture.layer_pattern import STATE_SPACE, layers, prediction_depths
from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.choices import Ablation
from megatron_txssm.compat import mend_megatron
from megatron_txssm.errors import UserError
from megatron_txssm.model.arguments import DEFAULTS, state_space_config
from megatron_txssm.model.document_attention import isolating
from megatron_txssm.model.experts import experts_layer
from megatron_txssm.model.fp8_emulation import Float8SpecProvider, emulated_fp8
from megatron_txssm.model.local_modules import TorchSpecProvider, backend_of
from megatron_txssm.model.prediction import PredictionLayer
from megatron_txssm.model.self_attention import UnifiedRotarySelfAttention
from megatron_txssm.model.state_space_mixer import StateSpaceMixer
from megatron_txssm.model.state_space_parameters import StateSpaceMixerSubmodules
from megatron_txssm.ops.ssd_triton import why_unavailable
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding

# Settings fixed in the layers below. Megatron has arguments for other values, which the layers would ignore.
BUILT_IN: dict[str, Any] = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    # Each of these would change what the experts of E compute, or which of them.
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_enable_expert_bias": False,
    "moe_expert_capacity_factor": None,
    "moe_shared_expert_gate": False,
    "moe_latent_size": None,
    "moe_input_jitter_eps": None,
    # Prediction depths whose gradients stop at the model, or that share their weights.
    "mtp_detach_heads": False,
    "mtp_use_repeated_layer": False,
    "rotary_interleaved": False,
    # Transformer Engine's norms would follow this; our local norms and exports would not.
    "layernorm_zero_centered_gamma": False,
    # It would feed fp32 activations to bf16 weights.
    "fp32_residual_connection": False,
}
# The same for arguments outside of a model's config.
BUILT_IN_ARGUMENTS: dict[str, Any] = {
    "reset_position_ids": False,
    "reset_attention_mask": False,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
}
# For attention layers: Unified RoPE, or no positions.
POSITION_EMBEDDING_TYPES = ("rope", "none")


@dataclass(frozen=True)
class LayerSettings:
    """What the layers need to know besides Megatron's TransformerConfig."""

    # None if the model has no state-space layer.
    state_space: StateSpaceConfig | None
    rotary: UnifiedRotaryEmbedding
    ablation: Ablation | None = None

    @classmethod
    def of_arguments(cls) -> "LayerSettings":
        """From Megatron's global arguments (and ours, if registered); UserError if they ask for other layers."""
        args: Any = get_args()
        for name, value in BUILT_IN_ARGUMENTS.items():
            if (asked := getattr(args, name, value)) != value:
                raise UserError(f"{name}={asked} is not supported by TransXSSM's layers; leave it out")
        if args.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise UserError(
                f"position_embedding_type={args.position_embedding_type} is not supported by TransXSSM's layers; "
                f"use {' or '.join(POSITION_EMBEDDING_TYPES)}"
            )
        # Without state-space layers, sizes that do not fit one are not an error. Other layers are refused by name.
        pattern = args.hybrid_layer_pattern
        all_layers = "".join([layers(pattern), *prediction_depths(pattern)])
        state_space = state_space_config(args) if STATE_SPACE in all_layers else None
        if state_space is not None:
            check_ssd_backend(state_space.ssd_backend)
        rotary = UnifiedRotaryEmbedding(
            base=args.rotary_base,
            interpolation_factor=args.rotary_seq_len_interpolation_factor or 1.0,
            table_precision=getattr(args, "rotary_table_precision", DEFAULTS["rotary_table_precision"]),
        )
        return cls(state_space, rotary, getattr(args, "ablation", DEFAULTS["ablation"]))


class TransXSSMStack(HybridStack):
    """Megatron's stack of hybrid layers, with TransXSSM's; `config.transformer_impl` selects their modules.

    Megatron's own stack always ends with Transformer Engine's norm; this one, with the backend's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules | None = None,
        *,
        settings: LayerSettings | None = None,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ):
        """`submodules`, the spec's, only has what HybridModel itself builds: the prediction depths."""
        # Stock Megatron-LM calls nothing else of ours, and unpatched it cannot save a bf16 model with fp32 parameters.
        mend_megatron()
        super().__init__(config, _layers_of(config, settings), post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = backend_of(config).layer_norm(rms_norm=True)(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def check_ssd_backend(backend: str) -> None:
    """UserError if "triton" cannot run here; a warning if "auto" falls back to PyTorch on a GPU."""
    reason = None if backend == "torch" else why_unavailable()
    if reason is None:
        return
    if backend == "triton":
        raise UserError(f"ssd_backend=triton cannot run here: {reason}; set model.ssd_backend to auto or torch")
    if torch.cuda.is_available():
        warnings.warn(f"ssd_backend=auto scans in PyTorch, which is slower: {reason}", stacklevel=2)


def _layers_of(config: TransformerConfig, settings: LayerSettings | None = None) -> HybridStackSubmodules:
    """The specs of all kinds of layers; `settings`: by default, of Megatron's arguments."""
    backend, settings = backend_of(config), settings or LayerSettings.of_arguments()
    for name, value in BUILT_IN.items():
        if (asked := getattr(config, name, value)) != value:
            raise UserError(f"{name}={asked} is not supported by TransXSSM's layers; use {value}")
    layers = _layer_specs(config, backend, settings)
    if config.transformer_impl == "local" and emulated_fp8(config):
        fp8_backend = Float8SpecProvider(attention=config.fp8_dot_product_attention)
        fp8_layers = _layer_specs(config, fp8_backend, settings)
        layers = {kind: _bf16_at_the_ends(layers[kind], fp8_layers[kind]) for kind in layers}
    return HybridStackSubmodules(**layers)


def _layer_specs(
    config: TransformerConfig, backend: BackendSpecProvider, settings: LayerSettings
) -> dict[str, ModuleSpec]:
    """Field of HybridStackSubmodules -> the layer's spec: norm → mixer or FFN → residual (arXiv:2506.09507, figure 2).

    Transformer Engine's linear layers include the preceding norm. The local spec saves its norms under the same names,
    so that checkpoints are interchangeable.
    """
    fused = backend.fuse_layernorm_and_linear()
    norm = IdentityOp if fused else backend.layer_norm(rms_norm=True, has_residual=True)
    # Megatron annotates this as a class, but accepts a function.
    add_residual: Any = get_bias_dropout_add
    if settings.ablation == "no_residual":
        add_residual = _without_residual
    elif settings.ablation == "no_norm":
        # The recipe is refused with Transformer Engine, whose norms are parts of linear layers.
        norm = IdentityOp

    def saved_as(norm_name: str, linear: str) -> dict[str, str]:
        return {} if fused else {f"{norm_name}.": f"{linear}.layer_norm_"}

    attention_layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention_spec(backend, settings.rotary),
            self_attn_bda=add_residual,
            sharded_state_dict_keys_map=saved_as("input_layernorm", "self_attention.linear_qkv"),
        ),
    )
    mlp_layer = ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(backend),
            mlp_bda=add_residual,
            sharded_state_dict_keys_map=saved_as("pre_mlp_layernorm", "mlp.linear_fc1"),
        ),
    )
    found = {"attention_layer": attention_layer, "mlp_layer": mlp_layer}
    if config.num_moe_experts is not None:
        found["moe_layer"] = experts_layer(config, backend)
    if settings.state_space is not None:
        found["mamba_layer"] = ModuleSpec(
            module=MambaLayer,
            submodules=MambaLayerSubmodules(
                norm=norm,
                mixer=_state_space_spec(backend, settings.state_space, settings.rotary),
                mamba_bda=add_residual,
                sharded_state_dict_keys_map=saved_as("norm", "mixer.in_proj"),
            ),
        )
    return found


def _without_residual(training: bool, fused: bool) -> Any:
    """For `get_bias_dropout_add`: the layer's output alone. Our layers have neither biases nor dropout."""
    return lambda output_and_bias, residual, prob: output_and_bias[0]


class _ByNumber:
    """Builds a layer from the first spec if it is among the first or last layers in bf16, otherwise from the second.

    Transformer Engine's modules take both roles, and Megatron switches them.
    """

    def __new__(
        cls, config: TransformerConfig, *, submodules: tuple[ModuleSpec, ModuleSpec], layer_number: int, **kwargs: Any
    ) -> Any:
        bf16, fp8 = submodules
        spec = bf16 if is_first_last_bf16_layer(config, layer_number - 1) else fp8
        return build_module(spec, config=config, layer_number=layer_number, **kwargs)


def _bf16_at_the_ends(bf16: ModuleSpec, fp8: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(module=_ByNumber, submodules=(bf16, fp8))


def _column_parallel_linear(backend: BackendSpecProvider) -> Any:
    """A mixer's first linear layer, fused with the norm where the backend supports it."""
    fused = backend.column_parallel_layer_norm_linear() if backend.fuse_layernorm_and_linear() else None
    return fused or backend.column_parallel_linear()


def _state_space_spec(
    backend: BackendSpecProvider, state_space: StateSpaceConfig, rotary: UnifiedRotaryEmbedding
) -> ModuleSpec:
    return ModuleSpec(
        module=StateSpaceMixer,
        params={"state_space": state_space, "rotary": rotary},
        submodules=StateSpaceMixerSubmodules(
            in_proj=_column_parallel_linear(backend), out_proj=backend.row_parallel_linear()
        ),
    )


def _attention_spec(backend: BackendSpecProvider, rotary: UnifiedRotaryEmbedding) -> ModuleSpec:
    core_attention: Any = backend.core_attention()
    # Our local core attention handles packed documents itself.
    if not isinstance(backend, TorchSpecProvider):
        core_attention = isolating(core_attention)
    return ModuleSpec(
        module=UnifiedRotarySelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rotary": rotary},
        submodules=SelfAttentionSubmodules(
            linear_qkv=_column_parallel_linear(backend),
            core_attention=core_attention,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )


_prediction = MultiTokenPredictionBlockSubmodules(
    layer_specs=[ModuleSpec(module=PredictionLayer, params={"layers_of": _layers_of})]
)
transxssm_stack_spec = ModuleSpec(
    module=TransXSSMStack,
    # The layers' specs depend on the config: the stack and each prediction depth make them.
    submodules=HybridStackSubmodules(
        mtp_block_spec=ModuleSpec(module=MultiTokenPredictionBlock, submodules=_prediction)
    ),
)
