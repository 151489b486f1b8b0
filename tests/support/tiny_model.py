"""Tiny configs, mixers and models shared by this folder's tests. They need Megatron's parallel state."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_txssm.architecture.layer_pattern import layers
from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.model.layer_specs import LayerSettings, TransXSSMStack
from megatron_txssm.model.state_space_mixer import StateSpaceMixer
from megatron_txssm.model.state_space_parameters import StateSpaceMixerSubmodules
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding

# (name in the checkpoint, global shape, offset of the piece in it, the piece)
Piece = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]

HIDDEN = 16
VOCABULARY = 64


def transformer_config(**overrides: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 24,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "transformer_impl": "local",
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**{**settings, **overrides})


def state_space_config(**overrides: Any) -> StateSpaceConfig:
    settings = {"hidden_size": HIDDEN, "num_heads": 4, "head_dim": 6, "state_size": 8, "num_groups": 2, "chunk_size": 8}
    return StateSpaceConfig(**{**settings, **overrides})


def build_mixer(
    state_space: StateSpaceConfig, config: TransformerConfig | None = None, **kwargs: Any
) -> StateSpaceMixer:
    return StateSpaceMixer(
        config or transformer_config(),
        StateSpaceMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
        layer_number=1,
        state_space=state_space,
        rotary=UnifiedRotaryEmbedding(),
        **kwargs,
    )


def build_hybrid(
    pattern: str,
    config: TransformerConfig | None = None,
    state_space: StateSpaceConfig | None = None,
    *,
    rotary: UnifiedRotaryEmbedding | None = None,
    vp_stage: int | None = None,
    **kwargs: Any,
) -> HybridModel:
    """This rank's pipeline stage of a hybrid model of our stack spec; `pattern` as Megatron's."""
    config = config or transformer_config(num_layers=len(layers(pattern)), is_hybrid_model=True)
    layer_settings = LayerSettings(state_space or state_space_config(), rotary or UnifiedRotaryEmbedding())
    spec = ModuleSpec(module=TransXSSMStack, params={"settings": layer_settings})
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hybrid_layer_pattern": pattern,
        "max_sequence_length": 64,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": True,
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        "vp_stage": vp_stage,
    }
    return HybridModel(config, spec, **{**settings, **kwargs})


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|."""
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    assert torch.isfinite(actual).all()
    expected = expected.double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Perturb every parameter: ones and equal values would hide mistakes in their order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise)


def pieces(model: torch.nn.Module, values: dict[str, Tensor]) -> list[Piece]:
    """One tensor per parameter (value or gradient) as this rank's pieces of the checkpoint's tensors."""
    found: list[Piece] = []
    parameters = dict(model.named_parameters())
    for entry in _entries(model):
        name = next(name for name, p in parameters.items() if p.data_ptr() == entry.data.data_ptr())
        if isinstance(entry, ShardedTensorFactory):
            shards = list(nested_values([entry.build_fn(entry.key, values[name], entry.replica_id, None)]))
        else:
            entry.data = values[name]
            shards = [entry]
        found += [(s.key, tuple(s.global_shape), tuple(s.global_offset), _piece(s)) for s in shards]
    return found


def assembled(of_ranks: list[list[Piece]]) -> dict[str, Tensor]:
    """Whole tensors by checkpoint name, from the pieces of all ranks; NaN where no rank has a piece."""
    whole: dict[str, Tensor] = {}
    for key, shape, offset, data in (piece for rank in of_ranks for piece in rank):
        tensor = whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
        tensor[_region(offset, data)] = data
    return whole


def place(model: torch.nn.Module, whole: dict[str, Tensor]) -> None:
    """Inverse of `assembled`: fill this rank's parameters from whole tensors."""
    for entry in _entries(model):
        for shard in nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
            shard.data.detach().copy_(whole[shard.key][shard.global_slice()])


def _entries(model: Any) -> list[Any]:
    """The sharded state dict's tensor entries, without Megatron's empty _extra_state."""
    entries = nested_values(model.sharded_state_dict())
    return [entry for entry in entries if isinstance(entry, ShardedTensor | ShardedTensorFactory)]


def _piece(shard: ShardedTensor) -> Tensor:
    """With the axis that numbers experts."""
    assert shard.data is not None
    return shard.data.detach().clone()[(None,) * shard.prepend_axis_num]


def _region(offset: tuple[int, ...], data: Tensor) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offset, data.shape, strict=True))
