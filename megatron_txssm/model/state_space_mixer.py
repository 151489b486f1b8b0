"""The state-space mixer, which replaces self-attention in a state-space layer.

B=batch  L=sequence length  D=hidden size  H=heads  P=head dim  G=groups  N=state size  K=convolution kernel
H and G count this tensor-parallel rank's share, L this context-parallel rank's. [L, B, D] is Megatron's layout; under
sequence parallelism the mixer's input and output hold L / tensor_model_parallel_size tokens, and the projections gather
and scatter them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_txssm.model.documents import PackedDocuments
from megatron_txssm.model.piecewise_scan import documents_before, scan
from megatron_txssm.model.state_space_parameters import StateSpaceParameters
from megatron_txssm.ops.mamba2 import causal_convolution, gated_rms_norm
from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd import is_fused, ssd_step
from megatron_txssm.ops.ssd_triton import has_scan_outside_autograd
from megatron_txssm.ops.unified_rope import length_scale


@dataclass
class StateSpaceCache:
    """Decoding's state between tokens, of constant size: see `StateSpaceMixer.forward`."""

    state_BHPN: Tensor | None = None
    # The convolution's last K-1 inputs; unused by variants without one.
    history_BEK: Tensor | None = None


class StateSpaceMixer(StateSpaceParameters):
    """in-projection → [z,] x, B, C, dt → rotation of B and C → SSD → out-projection.

    `state_space.position_encoding` selects the paper's variant (arXiv:2506.09507, table 2).
    """

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
        dt_BLH = self.step_sizes(dt_BLH)
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

    def step_sizes(self, dt_BLH: Tensor) -> Tensor:
        """dt in fp32, after bias and softplus."""
        dt_BLH = dt_BLH.float()
        return F.softplus(dt_BLH if self.dt_bias is None else dt_BLH + self.dt_bias)

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
