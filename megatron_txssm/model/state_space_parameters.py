"""The parameters of a state-space mixer.

D=hidden size  H=heads  P=head dim  G=groups  N=state size  K=convolution kernel
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.model.context_parallel import Zigzag
from megatron_txssm.model.packed_rows import saved_by_component
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding

# The in-projection's rows on a rank are padded to this multiple: GEMMs of odd sizes are two to three times slower
# (docs/gpu-results), and FP8 rejects them; its largest requirement is 32 (MXFP8).
ROWS_MULTIPLE = 32


# They set the decay exp(dt·A), which compounds over thousands of tokens; bf16 would leave its logarithm three digits.
FP32_PARAMETERS = ("A_log", "dt_bias", "D")


@dataclass
class StateSpaceMixerSubmodules:
    """The two projections: local, or Transformer Engine's (whose in-projection includes the preceding norm)."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class StateSpaceParameters(MegatronModule):
    """A state-space mixer's parameters: how they are sharded, their precision, and their names in a checkpoint.

    The in-projection is one column-parallel layer whose rows are packed per rank: [z_r, x_r, B_r, C_r, dt_r,
    padding_r]. The padding rows stay zero; checkpoints, exported models and `num_params` leave them out (Megatron's log
    counts them).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: StateSpaceMixerSubmodules,
        layer_number: int,
        state_space: StateSpaceConfig,
        rotary: UnifiedRotaryEmbedding,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        **_: Any,
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.state_space = state_space
        self.rotary = rotary
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_size = self.pg_collection.tp.size()
        state_space.check_tensor_parallel(self.tp_size)
        self.zigzag = Zigzag.of(self.pg_collection.cp)
        state_space.check_context_parallel(self.zigzag.size, self.tp_size)
        self.in_proj_sizes = {part: size // self.tp_size for part, size in state_space.in_proj_sizes.items()}
        self.conv_sizes = {part: size // self.tp_size for part, size in state_space.conv_sizes.items()}
        rows = sum(self.in_proj_sizes.values())
        self.padding = -rows % ROWS_MULTIPLE

        common = {"config": config, "bias": False, "is_expert": False, "tp_group": self.pg_collection.tp}
        self.in_proj = build_module(
            submodules.in_proj,
            state_space.hidden_size,
            self.tp_size * (rows + self.padding),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            name=name and f"{name}.in_proj",
            **common,
        )
        self.in_proj.weight.partition_sizes = [*self.in_proj_sizes.values(), self.padding]
        # Megatron's Muon orthogonalizes each component of its packed projection of Q, K and V, and so of this one.
        self.in_proj.weight.is_qkv = True
        self.in_proj.weight.qkv_split_shapes = [size for size in self.in_proj.weight.partition_sizes if size]
        with torch.no_grad():
            self.in_proj.weight[rows:] = 0
        self.out_proj = build_module(
            submodules.out_proj,
            state_space.inner_size,
            state_space.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            name=name and f"{name}.out_proj",
            **common,
        )
        self._build_parameters()

    def _build_parameters(self) -> None:
        """This rank's parameters besides the projections, all sharded over tensor-parallel ranks along dimension 0."""
        sizes = self.in_proj_sizes
        self.A_log = self._parameter(sizes["dt"], dtype=torch.float32)
        self.dt_bias = self._parameter(sizes["dt"], dtype=torch.float32) if self.state_space.dt_bias else None
        self.D = self._parameter(sizes["dt"], dtype=torch.float32) if self.conv_sizes else None
        if self.conv_sizes:
            channels = sum(self.conv_sizes.values())
            self.conv1d_weight = self._parameter(channels, 1, self.state_space.conv_kernel)
            self.conv1d_bias = self._parameter(channels)
            for parameter in (self.conv1d_weight, self.conv1d_bias):
                setattr(parameter, "partition_sizes", list(self.conv_sizes.values()))
            # Megatron's muP divides the learning rate of everything else that has several dimensions by the width.
            setattr(self.conv1d_weight, "is_embedding_parameter", True)
        if self.state_space.gated:
            self.norm_weight = self._parameter(sizes["x"])
        if self.config.perform_initialization:
            initializers = parameter_initializers(self.state_space)
            tracker: Any = get_cuda_rng_tracker()
            with tracker.fork():
                for parameter_name, parameter in self.named_parameters(recurse=False):
                    initializers[parameter_name](parameter.data)

    def _parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        parameter = nn.Parameter(
            torch.empty(*shape, dtype=dtype or self.config.params_dtype, device=torch.cuda.current_device())
        )
        for attribute, value in {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}.items():
            setattr(parameter, attribute, value)
        return parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StateSpaceParameters":
        """Moves and casts like any module, but keeps FP32_PARAMETERS and their gradients in fp32."""
        own = [parameter for name, parameter in self.named_parameters(recurse=False) if name in FP32_PARAMETERS]
        keep = {id(tensor) for parameter in own for tensor in (parameter, parameter.grad) if tensor is not None}

        def keep_fp32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            # Results without a dtype change are kept: to_empty() allocates memory for a meta tensor.
            return tensor.to(result.device) if id(tensor) in keep and result.dtype != torch.float32 else result

        return super()._apply(keep_fp32, recurse)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **_: Any
    ) -> dict[str, Any]:
        """Megatron's sharded state dict. Packed tensors are saved by component, so that every layout can load them."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            tensor_parallel_layers_axis_map=dict.fromkeys(own, 0),
            sharded_offsets=sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for child_name, child in self.named_children():
            sharded.update(
                sharded_state_dict_default(
                    child, f"{prefix}{child_name}.", sharded_offsets, metadata, tp_group=self.pg_collection.tp
                )
            )
        packed = {"in_proj.weight": self.in_proj_sizes}
        if self.conv_sizes:
            packed.update({"conv1d_weight": self.conv_sizes, "conv1d_bias": self.conv_sizes})
        for key, sizes in packed.items():
            sharded[prefix + key] = saved_by_component(sharded[prefix + key], sizes)
        return sharded

    def num_params(self) -> int:
        """Parameters over all tensor-parallel ranks, without the norm before the mixer."""
        return self.state_space.num_params()

    def flops_per_token(self, seq_length: int) -> float:
        """Model FLOPs per token, forward and backward, over all ranks."""
        return self.state_space.flops_per_token(seq_length)


def parameter_initializers(state_space: StateSpaceConfig) -> dict[str, Callable[[Tensor], Any]]:
    """In-place initializers of the parameters besides the projections, as in Mamba-2 (arXiv:2405.21060).

    A is uniform in [1, 16]; dt_bias is the inverse softplus of a dt drawn log-uniformly from [0.001, 0.1]; the
    convolution is uniform within ±1/√K, torch's default for K inputs per channel; D and the norm's weight are ones.
    """

    def init_A_log(tensor: Tensor) -> None:
        tensor.uniform_(1.0, 16.0).log_()

    def init_dt_bias(tensor: Tensor) -> None:
        dt = torch.exp(torch.empty_like(tensor).uniform_(*torch.tensor([1e-3, 1e-1]).log().tolist()))
        tensor.copy_(dt + torch.log(-torch.expm1(-dt)))

    bound = state_space.conv_kernel**-0.5
    return {
        "A_log": init_A_log,
        "dt_bias": init_dt_bias,
        "D": nn.init.ones_,
        "conv1d_weight": lambda tensor: tensor.uniform_(-bound, bound),
        "conv1d_bias": lambda tensor: tensor.uniform_(-bound, bound),
        "norm_weight": nn.init.ones_,
    }
