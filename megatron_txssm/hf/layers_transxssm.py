"""The layers of a TransXSSM for transformers: state-space mixer, attention (arXiv:2506.09507), and a block of them.

B=batch  L=sequence length  D=hidden size  H=heads  P=head dim  G=groups  N=state size  E=channels of the convolution
K=its taps  R=planes of rotation (half of a vector's width)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_txssm.hf.cache_transxssm import StateSpaceCacheLayer, TransXSSMCache
from megatron_txssm.hf.configuration_transxssm import TransXSSMConfig
from megatron_txssm.hf.ffn_transxssm import ffn_of_block, residual_projection
from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd import ssd, ssd_step

# Width of a vector -> cosines and sines of every token, each [B or 1, L, R], fp32.
RotaryTables = dict[int, tuple[Tensor, Tensor]]

# They set the decay exp(dt·A), which compounds over thousands of tokens, so they stay fp32.
FP32_PARAMETERS = ("A_log", "dt_bias", "D")


class TransXSSMAttention(nn.Module):
    """Causal self-attention with grouped queries; Unified RoPE on Q and K (eq. 2, 3), or no positions."""

    def __init__(self, config: TransXSSMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim or 0
        # transformers' attention functions read these.
        self.num_key_value_groups = config.num_attention_heads // (config.num_key_value_heads or 1)
        self.is_causal = True
        query_size = config.num_attention_heads * self.head_dim
        key_size = (config.num_key_value_heads or 1) * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = residual_projection(query_size, config)

    def forward(
        self,
        hidden_states: Tensor,
        tables: RotaryTables,
        attention_mask: Tensor | None,
        cache: TransXSSMCache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] → ([B, L, D], attention weights if the implementation returns them)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states).unflatten(-1, (-1, self.head_dim)) for project in projections)
        if self.config.attention_position_encoding == "rope":
            q, k = apply_rotary(q, *tables[self.head_dim]), apply_rotary(k, *tables[self.head_dim])
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        scaling = self.head_dim**-0.5
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that materialises its weights, [B, H, L, T]: `attn_implementation="eager"`."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TransXSSMStateSpaceMixer(nn.Module):
    """in-projection → [z,] x, B, C, dt → convolution, or rotation of B, C → SSD → [gate and norm →] out-projection."""

    def __init__(self, config: TransXSSMConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads = config.state_num_heads or 0
        self.sizes = config.in_proj_sizes
        self.conv_channels = sum(self.sizes[part] for part in ("x", "B", "C"))
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes.values()), bias=False)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32)) if config.state_dt_bias else None
        if config.position_encoding == "conv1d_d":
            self.D = nn.Parameter(torch.empty(heads, dtype=torch.float32))
            channels, taps = self.conv_channels, config.conv_kernel
            self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels)
        if config.state_gated:
            self.norm = TransXSSMGatedRMSNorm(config)
        self.out_proj = residual_projection(config.state_inner_size, config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TransXSSMStateSpaceMixer":
        """Moves and casts like any module, but never casts FP32_PARAMETERS and their gradients to half precision."""
        own = [parameter for name, parameter in self.named_parameters(recurse=False) if name in FP32_PARAMETERS]
        keep = {id(tensor) for parameter in own for tensor in (parameter, parameter.grad) if tensor is not None}

        def keep_fp32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrower = result.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(result.device) if id(tensor) in keep and narrower else result

        return super()._apply(keep_fp32, recurse)

    def forward(
        self,
        hidden_states: Tensor,
        tables: RotaryTables,
        scale_C: Tensor | None,
        mask_BL: Tensor | None,
        seq_idx: Tensor | None,
        cache: StateSpaceCacheLayer | None,
    ) -> Tensor:
        """[B, L, D] → [B, L, D]. Where `mask_BL` is 0, a token neither adds to the state nor decays it.

        `scale_C` ([B or 1, L]) multiplies C; the state restarts where `seq_idx` ([B or 1, L]) changes. `cache` holds
        the state before the first token and receives the state after the last.
        """
        config = self.config
        state_BHPN, history_BEK = (cache.state_BHPN, cache.history_BEK) if cache is not None else (None, None)
        projected_BLE = self.in_proj(hidden_states)
        if mask_BL is not None:
            projected_BLE = projected_BLE * mask_BL[..., None].to(projected_BLE.dtype)
        before, behind = self.sizes.get("z", 0), self.sizes["dt"]
        z_BLE, xBC_BLE, dt_BLH = projected_BLE.split([before, self.conv_channels, behind], dim=-1)
        if config.position_encoding == "conv1d_d":
            xBC_BLE, history_BEK = self._convolve(xBC_BLE, history_BEK, mask_BL, seq_idx)
        x_BLE, B_BLE, C_BLE = xBC_BLE.split([self.sizes[part] for part in ("x", "B", "C")], dim=-1)
        x_BLHP = x_BLE.unflatten(-1, (-1, config.state_head_dim))
        B_BLGN, C_BLGN = (part.unflatten(-1, (-1, config.state_size)) for part in (B_BLE, C_BLE))
        if config.position_encoding == "rope":
            B_BLGN, C_BLGN = (apply_rotary(part, *tables[config.state_size]) for part in (B_BLGN, C_BLGN))
        if scale_C is not None:
            C_BLGN = C_BLGN * scale_C[..., None, None].to(C_BLGN.dtype)
        dt_BLH = F.softplus(dt_BLH.float() + self.dt_bias if self.dt_bias is not None else dt_BLH.float())
        if mask_BL is not None:
            dt_BLH = dt_BLH * mask_BL[..., None].to(dt_BLH.dtype)
        A_H = -torch.exp(self.A_log.float())

        if x_BLHP.shape[1] == 1 and state_BHPN is not None:
            x_BHP, dt_BH, B_BGN, C_BGN = (tensor[:, 0] for tensor in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
            y_BHP, state_BHPN = ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, state_BHPN, backend="auto")
            y_BLHP = y_BHP[:, None]
        else:
            if seq_idx is not None:
                seq_idx = seq_idx.expand(x_BLHP.shape[:2])
            y_BLHP, state_BHPN = ssd(
                x_BLHP,
                dt_BLH,
                A_H,
                B_BLGN,
                C_BLGN,
                chunk_size=config.chunk_size,
                initial_state=state_BHPN,
                seq_idx=seq_idx,
                backend="auto",
            )
        if cache is not None:
            cache.replace(state_BHPN, history_BEK)
        if config.position_encoding == "conv1d_d":
            y_BLHP = y_BLHP + (self.D[:, None] * x_BLHP).to(y_BLHP.dtype)
        y_BLE = y_BLHP.to(projected_BLE.dtype).flatten(2)
        return self.out_proj(self.norm(y_BLE, z_BLE) if config.state_gated else y_BLE)

    def _convolve(
        self, xBC_BLE: Tensor, history_BEK: Tensor | None, mask_BL: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mamba-2's causal depthwise convolution and SiLU; also returns the last K-1 non-padding inputs.

        Taps skip padding and, if documents are packed, do not reach other documents.
        """
        length, before = xBC_BLE.shape[1], self.config.conv_kernel - 1
        if history_BEK is None:
            history_BEK = xBC_BLE.new_zeros(xBC_BLE.shape[0], self.conv_channels, before)
        seen_BEL = torch.cat([history_BEK, xBC_BLE.transpose(1, 2)], dim=-1)
        order_BL = None
        if mask_BL is not None:
            # Sort padding to the front, before the history: the rest is gapless and ends in the new history.
            order_BL = F.pad(mask_BL.int(), (before, 0), value=1).argsort(dim=1, stable=True)
            seen_BEL = seen_BEL.gather(2, order_BL[:, None].expand_as(seen_BEL))
        if seq_idx is None:
            out_BEL = self.conv1d(seen_BEL)
        else:
            bias_E: Any = self.conv1d.bias
            out_BEL = torch.zeros_like(seen_BEL[..., before:]) + bias_E[:, None]
            # Zeros precede the first token, so their document does not matter.
            documents = F.pad(seq_idx.expand(xBC_BLE.shape[:2]), (before, 0))
            if order_BL is not None:
                documents = documents.gather(1, order_BL)
            for tap in range(before + 1):
                reach = slice(tap, tap + length)
                same_document = (documents[:, None, reach] == documents[:, None, before:]).to(seen_BEL.dtype)
                out_BEL = out_BEL + self.conv1d.weight[:, 0, tap, None] * seen_BEL[..., reach] * same_document
        # A copy: a view would keep the inputs of the whole text in memory.
        history_BEK = seen_BEL[..., seen_BEL.shape[-1] - before :].clone()
        if order_BL is not None:
            # Back to the tokens' places; the convolution's output at padding is not used.
            place_BL = (order_BL.argsort(dim=1)[:, before:] - before).clamp(min=0)
            out_BEL = out_BEL.gather(2, place_BL[:, None].expand_as(out_BEL))
        return F.silu(out_BEL).transpose(1, 2), history_BEK


class TransXSSMGatedRMSNorm(nn.Module):
    """Mamba-2's gate, then RMSNorm within each group of heads."""

    def __init__(self, config: TransXSSMConfig):
        super().__init__()
        self.groups, self.eps = config.state_num_groups, config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.state_inner_size))

    def forward(self, y_BLE: Tensor, z_BLE: Tensor) -> Tensor:
        gated = (y_BLE.float() * F.silu(z_BLE.float())).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return (normed * self.weight.float()).to(y_BLE.dtype)


class TransXSSMDecoderLayer(GradientCheckpointingLayer):
    """norm → mixer → residual → norm → FFN or experts → residual (figure 2)."""

    def __init__(self, config: TransXSSMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if (config.layer_types or ())[layer_idx] == "full_attention":
            self.self_attn = TransXSSMAttention(config, layer_idx)
        else:
            self.mixer = TransXSSMStateSpaceMixer(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = ffn_of_block(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        tables: RotaryTables,
        *,
        attention_mask: Tensor | None = None,
        scale_C: Tensor | None = None,
        mask_BL: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cache: TransXSSMCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        if hasattr(self, "self_attn"):
            mixed, _ = self.self_attn(normed, tables, attention_mask, cache, **kwargs)
        else:
            states: Any = None if cache is None else cache.layers[self.layer_idx]
            mixed = self.mixer(normed, tables, scale_C, mask_BL, seq_idx, states)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
