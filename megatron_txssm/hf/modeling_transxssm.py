"""TransXSSM for transformers: state-space layers and attention with one rotary position embedding (arXiv:2506.09507).

It needs only torch and transformers; on CUDA, it scans with mamba-ssm's kernels if they are installed.

B=batch  L=sequence length  R=planes of rotation (half of a vector's width)
"""

# First: on unsupported versions of transformers, the imports below fail with less clear errors.
from megatron_txssm.hf.versions_transxssm import CACHE_NAME

# isort: split
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from megatron_txssm.hf.arguments_transxssm import check_arguments, the_cache
from megatron_txssm.hf.cache_transxssm import TransXSSMCache
from megatron_txssm.hf.configuration_transxssm import TransXSSMConfig, check_rope_type
from megatron_txssm.hf.ffn_transxssm import TransXSSMRouter
from megatron_txssm.hf.initialization_transxssm import initialize
from megatron_txssm.hf.layers_transxssm import (
    FP32_PARAMETERS,
    RotaryTables,
    TransXSSMAttention,
    TransXSSMDecoderLayer,
)
from megatron_txssm.hf.masks_transxssm import check_continues, check_static, padding_masks, token_positions
from megatron_txssm.hf.packing_transxssm import LENGTHS, attention_inputs, packed_documents, positions_in_documents
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding, length_scale


class TransXSSMPreTrainedModel(PreTrainedModel):
    config: TransXSSMConfig
    config_class = TransXSSMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransXSSMDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # A state cannot be rolled back: this makes transformers refuse assisted generation.
    _is_stateful = True
    _keep_in_fp32_modules_strict = list(FP32_PARAMETERS)  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": TransXSSMDecoderLayer,
        "attentions": TransXSSMAttention,
        "router_logits": OutputRecorder(TransXSSMRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module, self.config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers itself looks for the decorator in this file only; it is in ffn_transxssm.py."""
        return True


class TransXSSMModel(TransXSSMPreTrainedModel):
    """Embedding, layers, final norm: token ids to hidden states."""

    def __init__(self, config: TransXSSMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TransXSSMDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._rotary()
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
        cache: TransXSSMCache | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """`attention_mask` is 0 on padding, [B, tokens in the cache + L]; `position_ids` are [B or 1, L].

        With a static cache the mask may be [B, max_cache_len], and must be if the forward is compiled.

        A row may hold packed documents: `cu_seq_lens_q`, `seq_idx` ([B or 1, L]) or restarting position_ids mark where
        they begin. Attention, states and convolutions stay within a document; positions, if not given, restart in
        each. `cache` and `past_key_values` are two names for the same argument.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        lengths = {name: kwargs.pop(name, None) for name in LENGTHS}
        check_arguments(kwargs)
        cache = the_cache(cache, past_key_values)
        hidden_states: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.training and self.gradient_checkpointing and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError(
                    "gradient checkpointing computes each layer twice, and a cache would take its tokens twice; leave "
                    "the cache out, or compute under torch.no_grad()"
                )
            use_cache = False
        if use_cache and cache is None:
            cache = TransXSSMCache(self.config)
        batch, length = hidden_states.shape[:2]
        static = cache is not None and cache.max_cache_len is not None
        new: Any = slice(length) if cache is None else cache.new_tokens(length, hidden_states.device)
        attention_mask, mask_BL = padding_masks(attention_mask, cache, new, length)
        if cache is not None and cache.begun:
            check_continues(cache, seq_idx, lengths["cu_seq_lens_q"])
            documents_BL = None
        else:
            # A compiler cannot read positions to detect packed documents, which a static cache does not allow anyway.
            told = position_ids if position_ids is None or not (static and is_tracing(position_ids)) else None
            documents_BL = packed_documents((batch, length), seq_idx, lengths["cu_seq_lens_q"], told, mask_BL)
        if static:
            check_static(self.config, documents_BL)
        if position_ids is None:
            if documents_BL is None:
                position_ids = token_positions(attention_mask, new, hidden_states.device)
            else:
                position_ids = positions_in_documents(documents_BL, mask_BL)
        causal_mask: Any = None
        kernel: dict[str, Any] = {}
        if self.config.has_attention:
            causal_mask, kernel = attention_inputs(
                self.config, hidden_states, attention_mask, cache, documents_BL, lengths
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
                seq_idx=documents_BL,
                cache=cache,
                **kernel,
                **kwargs,
            )
        if cache is not None:
            cache.count(length, hidden_states.device)
            # A compiled graph may also run without packed documents.
            cache.packed |= documents_BL is not None and not is_tracing(documents_BL)
        returned: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **returned)

    def _tables(self, position_ids: Tensor) -> RotaryTables:
        """Cosines and sines, once for all layers; attention heads and the state share one spectrum."""
        config, rotary, widths = self.config, self._rotary(), set()
        if config.has_attention and config.attention_position_encoding == "rope":
            widths.add(config.head_dim)
        if config.position_encoding == "rope":
            widths.add(config.state_size)
        positions_L = position_ids.flatten()
        tables: RotaryTables = {}
        for width in widths:
            cos_LR, sin_LR = rotary.cos_sin(len(positions_L), width, positions_L=positions_L, device=positions_L.device)
            tables[width] = cos_LR.unflatten(0, position_ids.shape), sin_LR.unflatten(0, position_ids.shape)
        return tables

    def _rotary(self) -> UnifiedRotaryEmbedding:
        """From the current configuration: rope_parameters may have changed since it or the model was created."""
        rope = self.config.rope_parameters or {}
        check_rope_type(rope)
        return UnifiedRotaryEmbedding(
            base=rope.get("rope_theta", 10000.0),
            interpolation_factor=rope.get("factor", 1.0) if rope.get("rope_type") == "linear" else 1.0,
            table_precision=self.config.rotary_table_precision,
        )


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
        cache: TransXSSMCache | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, L, vocab_size], of the last `logits_to_keep` tokens unless it is 0; with `labels` also the loss.

        `labels` are the input ids, -100 for ignored tokens: they are shifted here. With `output_router_logits`, the
        loss includes the experts' load balance.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=the_cache(cache, past_key_values),
            seq_idx=seq_idx,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            aux_loss = self._load_balance(outputs.router_logits, attention_mask)
            loss = loss if aux_loss is None else loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _load_balance(self, router_logits: Any, attention_mask: Tensor | None) -> Any:
        """The experts' load balance (arXiv:2101.03961), without padding; None unless the router's logits are given."""
        if not router_logits:
            return None
        config, mask_BL = self.config, None if attention_mask is None else attention_mask.bool()
        return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, mask_BL)

    def create_masks_for_generate(
        self, attention_mask: Tensor | None = None, past_key_values: Any = None, cache: Any = None, **_: Any
    ) -> Tensor | None:
        """The mask that generate() passes to forward with a static cache: it does not grow, so one graph serves."""
        given = the_cache(cache, past_key_values)
        return None if attention_mask is None else given.whole_mask(attention_mask)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Create our cache where transformers would create its own."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={implementation!r} holds keys and values, but no states of state-space layers; "
                "leave it out (states have constant size anyway), or use 'static'"
            )
        given = the_cache(model_kwargs.get("cache"), model_kwargs.get("past_key_values"))
        if given is None and generation_config.use_cache is not False:
            room = None
            if implementation == "static":
                # Not smaller than the last one, for which graphs were compiled.
                rooms = (max_cache_length, generation_config.max_cache_len, getattr(self, "_last_max_cache_len", 0))
                room = self._last_max_cache_len = max(number or 0 for number in rooms)
            model_kwargs[CACHE_NAME] = TransXSSMCache(self.config, room)
            return None
        if given is not None and given.max_cache_len is not None and given.max_cache_len < max_cache_length:
            raise ValueError(
                f"max_cache_len={given.max_cache_len} of the cache is less than the {max_cache_length} tokens that it "
                "may have to hold; make it larger, or max_new_tokens smaller"
            )
        default: Any = super()
        return default._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
