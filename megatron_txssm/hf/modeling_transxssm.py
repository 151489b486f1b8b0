"""TransXSSM for transformers: state-space layers and attention under one rotary position embedding (arXiv:2506.09507).

It needs torch and transformers alone; on CUDA, mamba-ssm's kernels do the scan where they are installed.

B=batch  L=sequence length  D=hidden size  H=heads  P=head dim  G=groups  N=state size  E=channels of the convolution
K=its taps  R=planes of rotation (half of a vector's width)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from megatron_txssm.hf.cache_transxssm import StateSpaceCacheLayer, TransXSSMCache
from megatron_txssm.hf.configuration_transxssm import TransXSSMConfig
from megatron_txssm.model.unified_rope import UnifiedRotaryEmbedding, length_scale
from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd import ssd, ssd_step

logger = logging.get_logger(__name__)

# Width of a vector -> cosines and sines of every token, each [B or 1, L, R], fp32.
RotaryTables = dict[int, tuple[Tensor, Tensor]]


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
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        tables: RotaryTables,
        attention_mask: Tensor | None,
        past_key_values: TransXSSMCache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] → ([B, L, D], attention weights where the implementation gives them)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states).unflatten(-1, (-1, self.head_dim)) for project in projections)
        if self.config.attention_position_encoding == "rope":
            q, k = apply_rotary(q, *tables[self.head_dim]), apply_rotary(k, *tables[self.head_dim])
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
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
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads)) if config.state_dt_bias else None
        if config.position_encoding == "conv1d_d":
            self.D = nn.Parameter(torch.empty(heads))
            channels, taps = self.conv_channels, config.conv_kernel
            self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels)
        if config.state_gated:
            self.norm = TransXSSMGatedRMSNorm(config)
        self.out_proj = nn.Linear(config.state_inner_size, config.hidden_size, bias=False)

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

        `scale_C` ([B or 1, L]) multiplies C, the state restarts where `seq_idx` ([B or 1, L]) changes, and `cache`
        gives the state before the first token and takes the one behind the last.
        """
        config = self.config
        state_BHPN, history_BEK = (cache.state_BHPN, cache.history_BEK) if cache is not None else (None, None)
        projected_BLE = self.in_proj(hidden_states)
        if mask_BL is not None:
            projected_BLE = projected_BLE * mask_BL[..., None].to(projected_BLE.dtype)
        before, behind = self.sizes.get("z", 0), self.sizes["dt"]
        z_BLE, xBC_BLE, dt_BLH = projected_BLE.split([before, self.conv_channels, behind], dim=-1)
        if config.position_encoding == "conv1d_d":
            xBC_BLE, history_BEK = self._convolve(xBC_BLE, history_BEK, seq_idx)
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

    def _convolve(self, xBC_BLE: Tensor, history_BEK: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mamba-2's causal depthwise convolution and SiLU; returns the last K-1 inputs, too.

        Where documents are packed, no tap reaches into another one's tokens.
        """
        length, before = xBC_BLE.shape[1], self.config.conv_kernel - 1
        if history_BEK is None:
            history_BEK = xBC_BLE.new_zeros(xBC_BLE.shape[0], self.conv_channels, before)
        seen_BEL = torch.cat([history_BEK, xBC_BLE.transpose(1, 2)], dim=-1)
        if seq_idx is None:
            out_BEL = self.conv1d(seen_BEL)
        else:
            bias_E: Any = self.conv1d.bias
            out_BEL = torch.zeros_like(seen_BEL[..., before:]) + bias_E[:, None]
            documents = F.pad(seq_idx, (before, 0), value=-1)
            for tap in range(before + 1):
                reach = slice(tap, tap + length)
                same_document = (documents[:, None, reach] == seq_idx[:, None]).to(seen_BEL.dtype)
                out_BEL = out_BEL + self.conv1d.weight[:, 0, tap, None] * seen_BEL[..., reach] * same_document
        # A copy: a view would keep the inputs of the whole text in memory.
        return F.silu(out_BEL).transpose(1, 2), seen_BEL[..., seen_BEL.shape[-1] - before :].clone()


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


class TransXSSMMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransXSSMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class TransXSSMDecoderLayer(GradientCheckpointingLayer):
    """norm → mixer → residual → norm → FFN → residual (figure 2)."""

    def __init__(self, config: TransXSSMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if (config.layer_types or ())[layer_idx] == "full_attention":
            self.self_attn = TransXSSMAttention(config, layer_idx)
        else:
            self.mixer = TransXSSMStateSpaceMixer(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = TransXSSMMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        tables: RotaryTables,
        *,
        attention_mask: Tensor | None = None,
        scale_C: Tensor | None = None,
        mask_BL: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: TransXSSMCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        if hasattr(self, "self_attn"):
            mixed, _ = self.self_attn(normed, tables, attention_mask, past_key_values, **kwargs)
        else:
            cache: Any = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            mixed = self.mixer(normed, tables, scale_C, mask_BL, seq_idx, cache)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class TransXSSMPreTrainedModel(PreTrainedModel):
    config: TransXSSMConfig
    config_class = TransXSSMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransXSSMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # A state cannot go back: transformers then refuses assisted generation.
    _is_stateful = True
    # They set the decay exp(dt·A), which compounds over thousands of tokens.
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": TransXSSMDecoderLayer,
        "attentions": TransXSSMAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in training (Mamba-2's way): A uniform in [1, 16], dt log-uniform in [0.001, 0.1], D ones."""
        super()._init_weights(module)
        if isinstance(module, TransXSSMStateSpaceMixer):
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log())
            if module.dt_bias is not None:
                log_range = torch.tensor([1e-3, 1e-1]).log().tolist()
                dt = torch.empty_like(module.dt_bias).uniform_(*log_range).exp()
                init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))
            if hasattr(module, "D"):
                init.ones_(module.D)


class TransXSSMModel(TransXSSMPreTrainedModel):
    """Embedding, layers, final norm: token ids to hidden states."""

    def __init__(self, config: TransXSSMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            TransXSSMDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        rope = config.rope_parameters or {}
        self.rotary = UnifiedRotaryEmbedding(
            base=rope.get("rope_theta", 10000.0),
            interpolation_factor=rope.get("factor", 1.0) if rope.get("rope_type") == "linear" else 1.0,
            table_precision=config.rotary_table_precision,
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransXSSMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`attention_mask` is 0 on padding, [B, tokens in the cache + L]; `position_ids` are [B or 1, L].

        Without a mask and with nothing in the cache, position_ids that restart mark packed documents: neither attention
        nor a state crosses their borders.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and self.training and self.gradient_checkpointing:
            logger.warning_once("use_cache=True has no effect under gradient checkpointing")
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = TransXSSMCache(self.config)
        check_cache(past_key_values)
        seen, length = (past_key_values.get_seq_length() if past_key_values else 0), hidden_states.shape[1]
        mask_BL = _padding(attention_mask, seen, length)
        seq_idx = None
        if position_ids is None:
            position_ids = _positions(attention_mask, seen, length, hidden_states.device)
        elif attention_mask is None and not seen:
            seq_idx = find_packed_sequence_indices(position_ids)
        causal_mask = None
        if self.config.has_attention:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                # transformers looks for packed documents only where there is no cache, be it empty.
                past_key_values=past_key_values if seen else None,
                position_ids=position_ids,
            )
        scale_C = None
        if self.config.length_scaling_base is not None:
            scale_C = length_scale(position_ids, self.config.length_scaling_base)
        tables = self._tables(position_ids)

        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                tables,
                attention_mask=causal_mask,
                scale_C=scale_C,
                mask_BL=mask_BL,
                seq_idx=seq_idx,
                past_key_values=past_key_values,
                **kwargs,
            )
        if past_key_values is not None:
            past_key_values.seen_tokens += length
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _tables(self, position_ids: Tensor) -> RotaryTables:
        """Cosines and sines, once for all layers; attention's heads and the state take theirs from one spectrum."""
        config, widths = self.config, set()
        if config.has_attention and config.attention_position_encoding == "rope":
            widths.add(config.head_dim)
        if config.position_encoding == "rope":
            widths.add(config.state_size)
        positions_L, tables = position_ids.flatten(), RotaryTables()
        for width in widths:
            cos_LR, sin_LR = self.rotary.cos_sin(
                len(positions_L), width, positions_L=positions_L, device=positions_L.device
            )
            tables[width] = cos_LR.unflatten(0, position_ids.shape), sin_LR.unflatten(0, position_ids.shape)
        return tables


def check_cache(past_key_values: Any) -> None:
    """TypeError for another class's cache, which could not hold the states."""
    if past_key_values is not None and not hasattr(past_key_values, "seen_tokens"):
        raise TypeError(
            f"past_key_values is a {type(past_key_values).__name__}, which cannot hold the states of state-space "
            "layers; use TransXSSMCache(model.config), or leave it to generate()"
        )


def _padding(attention_mask: Tensor | None, seen: int, length: int) -> Tensor | None:
    """[B, L] of a 2-D mask over all tokens up to now."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != seen + length:
        raise ValueError(
            f"attention_mask.shape={list(attention_mask.shape)} does not fit {seen} tokens in the cache and {length} "
            f"new ones; use [batch, {seen + length}], 0 on padding"
        )
    return attention_mask[:, -length:]


def _positions(attention_mask: Tensor | None, seen: int, length: int, device: torch.device) -> Tensor:
    """[B or 1, L]: the number of tokens before each one, padding not counted."""
    if attention_mask is None:
        return torch.arange(seen, seen + length, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


class TransXSSMForCausalLM(TransXSSMPreTrainedModel, GenerationMixin):
    """TransXSSMModel with an LM head: logits, loss, generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransXSSMConfig):
        super().__init__(config)
        self.model = TransXSSMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TransXSSMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, vocab_size], of the last `logits_to_keep` tokens where it is not 0; with `labels` the loss.

        `labels` are the input ids themselves, -100 where none counts: the shift to the next token happens here.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        """Where transformers would make a cache of its own, ours."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={implementation!r} holds keys and values, but no states of state-space layers; "
                "leave it out: the states are of constant size as they are"
            )
        check_cache(model_kwargs.get("past_key_values"))
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = TransXSSMCache(self.config)
            return None
        default: Any = super()
        return default._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
