"""TransXSSM's layers as Megatron-Core block specs: how the model registers with Megatron.

Megatron imports `transxssm_block_spec` by name (`--spec megatron_txssm.model.layer_specs transxssm_block_spec`) and
calls it with the model's config. The result is an ordinary GPT decoder in which a state-space mixer replaces
self-attention in seven of eight layers. Stock Megatron-LM's pretrain_gpt.py accepts it unchanged; stock.py adds our
arguments to that script.
"""

import warnings
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, get_backend
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.training import get_args

from megatron_txssm.architecture.layer_pattern import ATTENTION, STATE_SPACE, layer_kinds
from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.compat import mend_megatron
from megatron_txssm.errors import UserError
from megatron_txssm.model.arguments import DEFAULTS, state_space_config
from megatron_txssm.model.document_attention import isolating
from megatron_txssm.model.fp8_emulation import Float8SpecProvider, emulated_fp8
from megatron_txssm.model.local_modules import TorchSpecProvider
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
    "num_moe_experts": None,
    "mtp_num_layers": None,
    "rotary_interleaved": False,
    # Transformer Engine's norms would follow this; our local norms and exports would not.
    "layernorm_zero_centered_gamma": False,
    # It would feed fp32 activations to bf16 weights.
    "fp32_residual_connection": False,
    # Fields of Megatron's GPTModelConfig.
    "rotary_percent": 1.0,
    "rope_scaling": False,
}
# The same for arguments outside of a model's config.
BUILT_IN_ARGUMENTS: dict[str, Any] = {
    "reset_position_ids": False,
    "reset_attention_mask": False,
    "heterogeneous_layers_config_path": None,
}
# For attention layers: Unified RoPE, or no positions.
POSITION_EMBEDDING_TYPES = ("rope", "none")


def transxssm_block_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder block of this pipeline stage, from Megatron's global arguments (and ours, if registered).

    `config` is Megatron's GPTModelConfig or TransformerConfig.
    """
    # Stock Megatron-LM calls nothing else of ours, and unpatched it cannot save a bf16 model with fp32 parameters.
    mend_megatron()
    args: Any = get_args()
    for name, value in BUILT_IN_ARGUMENTS.items():
        if (asked := getattr(args, name, value)) != value:
            raise UserError(f"{name}={asked} is not supported by TransXSSM's layers; leave it out")
    if args.position_embedding_type not in POSITION_EMBEDDING_TYPES:
        raise UserError(
            f"position_embedding_type={args.position_embedding_type} is not supported by TransXSSM's layers; "
            f"use {' or '.join(POSITION_EMBEDDING_TYPES)}"
        )
    rotary = UnifiedRotaryEmbedding(
        base=args.rotary_base,
        interpolation_factor=args.rotary_seq_len_interpolation_factor or 1.0,
        table_precision=getattr(args, "rotary_table_precision", DEFAULTS["rotary_table_precision"]),
    )
    pattern = getattr(args, "layer_pattern", DEFAULTS["layer_pattern"])
    # Without state-space layers, sizes that do not fit one are not an error.
    state_space = state_space_config(args) if STATE_SPACE in pattern else None
    if state_space is not None:
        check_ssd_backend(state_space.ssd_backend)
    return hybrid_block_spec(config, pattern, state_space, rotary, vp_stage=vp_stage)


def check_ssd_backend(backend: str) -> None:
    """UserError if "triton" cannot run here; a warning if "auto" falls back to PyTorch on a GPU."""
    reason = None if backend == "torch" else why_unavailable()
    if reason is None:
        return
    if backend == "triton":
        raise UserError(f"ssd_backend=triton cannot run here: {reason}; set model.ssd_backend to auto or torch")
    if torch.cuda.is_available():
        warnings.warn(f"ssd_backend=auto scans in PyTorch, which is slower: {reason}", stacklevel=2)


def hybrid_block_spec(
    config: Any,
    layer_pattern: str,
    state_space: StateSpaceConfig | None,
    rotary: UnifiedRotaryEmbedding,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The block spec of one pipeline stage, from explicit settings; `config.transformer_impl` selects the modules.

    `state_space` is None if the pattern has no state-space layer.
    """
    for name, value in BUILT_IN.items():
        if (asked := getattr(config, name, value)) != value:
            raise UserError(f"{name}={asked} is not supported by TransXSSM's layers; use {value}")
    transformer: Any = getattr(config, "transformer", config)
    # Otherwise Megatron saves all layers as one stacked tensor, which requires identical layers.
    transformer.hetereogenous_dist_checkpoint = True
    backend = TorchSpecProvider() if config.transformer_impl == "local" else get_backend(config.transformer_impl)
    layers = fp8_layers = _layer_specs(config, backend, state_space, rotary)
    if config.transformer_impl == "local" and emulated_fp8(transformer):
        fp8_backend = Float8SpecProvider(attention=transformer.fp8_dot_product_attention)
        fp8_layers = _layer_specs(config, fp8_backend, state_space, rotary)
    kinds = layer_kinds(layer_pattern, config.num_layers)
    return TransformerBlockSubmodules(
        layer_specs=[
            (layers if is_first_last_bf16_layer(transformer, index) else fp8_layers)[kinds[index]]
            for index in _stage_layers(config, vp_stage, pp_rank)
        ],
        layer_norm=backend.layer_norm(rms_norm=True),
    )


def _layer_specs(
    config: Any, backend: BackendSpecProvider, state_space: StateSpaceConfig | None, rotary: UnifiedRotaryEmbedding
) -> dict[str, ModuleSpec]:
    """Layer kind -> its spec."""
    layers = {ATTENTION: _layer_spec(config, backend, "linear_qkv", _attention_spec(backend, rotary))}
    if state_space is not None:
        layers[STATE_SPACE] = _layer_spec(config, backend, "in_proj", _state_space_spec(backend, state_space, rotary))
    return layers


def _stage_layers(config: Any, vp_stage: int | None, pp_rank: int | None) -> range | list[int]:
    """0-based indices of the layers that this pipeline stage builds."""
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))


def _layer_spec(config: Any, backend: BackendSpecProvider, first_linear: str, mixer: ModuleSpec) -> ModuleSpec:
    """norm → mixer → residual → norm → MLP → residual (arXiv:2506.09507, figure 2).

    Transformer Engine's linear layers include the preceding norm. The local spec saves its norms under the same names,
    so that checkpoints are interchangeable.
    """
    fused = backend.fuse_layernorm_and_linear()
    # Megatron annotates this as a class, but accepts a function.
    add_residual: Any = get_bias_dropout_add
    norm = IdentityOp if fused else backend.layer_norm(rms_norm=True, has_residual=True)
    names = {
        "input_layernorm.": f"self_attention.{first_linear}.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=mixer,
            self_attn_bda=add_residual,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(backend),
            mlp_bda=add_residual,
            sharded_state_dict_keys_map={} if fused else names,
        ),
    )


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
