"""The state-space mixer, which replaces self-attention in a state-space layer.

B=batch  L=sequence length  D=hidden size  H=heads  P=head dim  G=groups  N=state size  K=convolution kernel
H and G count this tensor-parallel rank's share, L this context-parallel rank's. [L, B, D] is Megatron's layout; under
sequence parallelism the mixer's input and output hold L / tensor_model_parallel_size tokens, and the projections gather
and scatter them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
from megatron_txssm.model.documents import PackedDocuments
from megatron_txssm.model.packed_rows import saved_by_component
from megatron_txssm.model.piecewise_scan import documents_before, scan
from megatron_txssm.ops.mamba2 import causal_convolution, gated_rms_norm
from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd import is_fused, ssd_step
from megatron_txssm.ops.ssd_triton import has_scan_outside_autograd
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding, length_scale

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


@dataclass
class StateSpaceCache:
    """Decoding's state between tokens, of constant size: see `StateSpaceMixer.forward`."""

    state_BHPN: Tensor | None = None
    # The convolution's last K-1 inputs; unused by variants without one.
    history_BEK: Tensor | None = None


class StateSpaceMixer(MegatronModule):
    """in-projection → [z,] x, B, C, dt → rotation of B and C → SSD → out-projection.

    `state_space.position_encoding` selects the paper's variant (arXiv:2506.09507, table 2). The in-projection is one
    column-parallel layer whose rows are packed per rank: [z_r, x_r, B_r, C_r, dt_r, padding_r]. The padding rows stay
    zero; checkpoints, exported models and `num_params` leave them out (Megatron's log counts them).
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StateSpaceMixer":
        """Moves and casts like any module, but keeps FP32_PARAMETERS and their gradients in fp32."""
        own = [parameter for name, parameter in self.named_parameters(recurse=False) if name in FP32_PARAMETERS]
        keep = {id(tensor) for parameter in own for tensor in (parameter, parameter.grad) if tensor is not None}

        def keep_fp32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            # Results without a dtype change are kept: to_empty() allocates memory for a meta tensor.
            return tensor.to(result.device) if id(tensor) in keep and result.dtype != torch.float32 else result

        return super()._apply(keep_fp32, recurse)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_context: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[L, B, D] → ([L, B, D], bias=None).

        With an `inference_context` (Megatron's StaticInferenceContext) the tokens continue the sequence in the layer's
        cache; L may be 1 or any number. With `packed_seq_params` the state restarts in every document. Keyword
        arguments that only concern attention are ignored.
        """
        documents = kwargs.get("packed_seq_params")
        if documents is not None and not isinstance(documents, PackedDocuments):
            raise ValueError("state-space layers only accept packed documents as documents.PackedDocuments")
        cache, offset = self._cache(inference_context)
        projected_LBE, _ = self.in_proj(hidden_states)
        if inference_context is None and self._is_fused(projected_LBE):
            return self.out_proj(self._scan_fused(projected_LBE, documents))
        y_LBE, cache = self._scan(projected_LBE, offset, cache, documents)
        if inference_context is not None:
            inference_context.key_value_memory_dict[self.layer_number] = cache
        return self.out_proj(y_LBE)

    def _is_fused(self, projected_LBE: Tensor) -> bool:
        """Whether `_scan_fused` can replace `_scan`: it covers the usual training cases."""
        sizes = self.state_space
        if self.conv_sizes or sizes.gated or sizes.length_scaling_base is not None or self.zigzag.size > 1:
            return False
        return is_fused(sizes.ssd_backend, projected_LBE, self.A_log, self.dt_bias) and has_scan_outside_autograd()

    def _scan_fused(self, projected_LBE: Tensor, documents: PackedDocuments | None) -> Tensor:
        """Rotation and SSD of the packed projection, [L, B, E] → [L, B, H·P]."""
        from megatron_txssm.ops.ssd_fused_triton import Sizes, scan_packed

        sizes, groups = self.state_space, self.in_proj_sizes["B"] // self.state_space.state_size
        tables = None
        if sizes.position_encoding == "rope":
            tables = self.rotary.cos_sin(projected_LBE.shape[0], sizes.state_size, device=projected_LBE.device)
        return scan_packed(
            projected_LBE,
            self.A_log,
            self.dt_bias,
            tables,
            Sizes(sizes.head_dim, groups, sizes.state_size, sizes.chunk_size),
            seq_idx=None if documents is None else documents.document_BL,
        )

    def _cache(self, inference_context: Any) -> tuple[StateSpaceCache, int]:
        """The layer's cache and the position of the first new token."""
        if inference_context is None:
            return StateSpaceCache(), 0
        if not inference_context.is_static_batching():
            raise ValueError("state-space layers decode with Megatron's StaticInferenceContext only")
        if self.zigzag.size > 1:
            raise ValueError("state-space layers do not decode under context parallelism")
        offset = inference_context.sequence_len_offset
        if offset == 0:
            return StateSpaceCache(), 0
        return inference_context.key_value_memory_dict[self.layer_number], offset

    def _scan(
        self, projected_LBE: Tensor, offset: int, cache: StateSpaceCache, documents: PackedDocuments | None
    ) -> tuple[Tensor, StateSpaceCache]:
        """Everything between the projections; returns y, contiguous, and the cache after the last token."""
        sizes, state_space = self.in_proj_sizes, self.state_space
        of_x, of_BC = sizes["x"], sizes["B"] + sizes["C"]
        merged = [sizes.get("z", 0), of_x + of_BC, sizes["dt"], self.padding]
        z_LBE, xBC_LBE, dt_LBH, _ = projected_LBE.split(merged, dim=-1)
        xBC_BLE, dt_BLH, history_BEK = xBC_LBE.transpose(0, 1), dt_LBH.transpose(0, 1), cache.history_BEK
        if self.conv_sizes:
            xBC_BLE, history_BEK = self._convolve(xBC_BLE, history_BEK, documents)
        x_BLE, BC_BLE = xBC_BLE.split([of_x, of_BC], dim=-1)
        x_BLHP = x_BLE.unflatten(-1, (-1, state_space.head_dim))
        B_BLGN, C_BLGN = self._rotate(BC_BLE, offset, documents)
        dt_BLH = dt_BLH.float()
        dt_BLH = F.softplus(dt_BLH if self.dt_bias is None else dt_BLH + self.dt_bias)
        A_H = -torch.exp(self.A_log)

        if x_BLHP.shape[1] == 1 and cache.state_BHPN is not None:
            x_BHP, dt_BH, B_BGN, C_BGN = (t.squeeze(1) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
            y_BHP, state_BHPN = ssd_step(
                x_BHP, dt_BH, A_H, B_BGN, C_BGN, cache.state_BHPN, D_H=self.D, backend=state_space.ssd_backend
            )
            y_BLHP = y_BHP.unsqueeze(1)
        else:
            y_BLHP, state_BHPN = scan(
                x_BLHP,
                dt_BLH,
                A_H,
                B_BLGN,
                C_BLGN,
                state_space=state_space,
                zigzag=self.zigzag,
                D_H=self.D,
                document_BL=None if documents is None else documents.document_BL,
                initial_state=cache.state_BHPN,
            )
        y_LBE = y_BLHP.to(projected_LBE.dtype).flatten(2).transpose(0, 1).contiguous()
        if state_space.gated:
            y_LBE = gated_rms_norm(
                y_LBE,
                z_LBE,
                self.norm_weight,
                # Groups never cross ranks, so every layout gives the same result.
                groups=state_space.num_groups // self.tp_size,
                eps=self.config.layernorm_epsilon,
                backend=state_space.ssd_backend,
            )
        return y_LBE, StateSpaceCache(state_BHPN, history_BEK)

    def _rotate(self, BC_BLE: Tensor, offset: int, documents: PackedDocuments | None) -> tuple[Tensor, Tensor]:
        """B and C, rotated together by Unified RoPE (eq. 2, 3), C scaled as in appendix A; [B, L, G, N] each."""
        BC_BLGN = BC_BLE.unflatten(-1, (-1, self.state_space.state_size))
        ranges = self.zigzag.ranges(BC_BLE.shape[1], offset)
        if self.state_space.position_encoding == "rope":
            width, device = self.state_space.state_size, BC_BLE.device
            tables = [self.rotary.cos_sin(r.stop - r.start, width, offset=r.start, device=device) for r in ranges]
            cos_LR, sin_LR = tables[0] if len(tables) == 1 else map(torch.cat, zip(*tables, strict=True))
            BC_BLGN = apply_rotary(BC_BLGN, cos_LR, sin_LR, backend=self.state_space.ssd_backend)
        B_BLGN, C_BLGN = BC_BLGN.chunk(2, dim=2)
        if self.state_space.length_scaling_base is not None:
            if documents is None:
                positions_BL = torch.cat([torch.arange(r.start, r.stop, device=BC_BLE.device) for r in ranges])[None]
            else:
                assert documents.position_BL is not None
                positions_BL = self.zigzag.own(documents.position_BL)
            scale_BL = length_scale(positions_BL, self.state_space.length_scaling_base)
            C_BLGN = C_BLGN * scale_BL[..., None, None].to(C_BLGN.dtype)
        return B_BLGN, C_BLGN

    def _convolve(
        self, xBC_BLE: Tensor, history_BEK: Tensor | None, documents: PackedDocuments | None
    ) -> tuple[Tensor, Tensor]:
        """Mamba-2's convolution of x, B and C; also returns the last K-1 inputs. E counts the channels of all three.

        A context-parallel rank convolves each piece as a row, after the last inputs of the preceding piece.
        """
        before, backend = self.conv1d_weight.shape[-1] - 1, self.state_space.ssd_backend
        document_BL = None if documents is None else documents.document_BL
        xBC_blE, document_bl, document_before_bK = self.zigzag.fold(xBC_BLE), None, None
        if document_BL is not None:
            document_bl = self.zigzag.fold(self.zigzag.own(document_BL))
        if self.zigzag.size > 1:
            history_BEK, backend = self.zigzag.previous_tails(xBC_blE, before).mT, "torch"
            if document_BL is not None:
                document_before_bK = documents_before(document_BL, self.zigzag, before)
        out_blE = causal_convolution(
            xBC_blE,
            self.conv1d_weight,
            self.conv1d_bias,
            history_BEK=history_BEK,
            document_BL=document_bl,
            document_before_BK=document_before_bK,
            backend=backend,
        )
        # Always a copy: a view would keep the whole projection in memory.
        tail_bEK = xBC_blE[:, -before:].mT
        if history_BEK is None:
            tail_bEK = F.pad(tail_bEK, (before - tail_bEK.shape[-1], 0))
        else:
            tail_bEK = torch.cat([history_BEK, tail_bEK], dim=-1)[..., -before:]
        return self.zigzag.unfold(out_blE), tail_bEK

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
