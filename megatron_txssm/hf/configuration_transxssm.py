"""The transformers configuration of TransXSSM, its Mamba-2 and Jamba baselines, and anything in between.

Names are those of transformers where it has one, otherwise those of the recipe's `model` section.
"""

# First: on unsupported versions of transformers, the imports below fail with less clear errors.
from megatron_txssm.hf.versions_transxssm import CACHE_NAME

# isort: split
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# The paper's module: seven state-space layers, then one attention layer (arXiv:2506.09507, section 3).
_MODULE = ["linear_attention"] * 7 + ["full_attention"]
# Other types either change frequencies as a text grows (such as "dynamic"), which contradicts the accumulated state,
# or scale cosines and sines ("yarn", "longrope"), which softmax absorbs and a state does not.
ROPE_TYPES = ("default", "linear")


@strict
class TransXSSMConfig(PreTrainedConfig):
    """Configuration of `TransXSSMForCausalLM`; raises huggingface_hub's StrictDataclassError for invalid fields."""

    model_type = "transxssm"
    # Writes the code into a folder and returns config.json's auto_map. None in a copy of this file beside weights:
    # transformers itself copies code that it loaded from there.
    write_code: ClassVar[Callable[[Path], dict[str, str]] | None] = None
    keys_to_ignore_at_inference = [CACHE_NAME]  # noqa: RUF012  (transformers' own way to state it)

    vocab_size: int = 50277
    hidden_size: int = 768
    # Inner channels of the SwiGLU FFN of a dense layer.
    intermediate_size: int = 4224
    num_hidden_layers: int = 24
    # The kind of each layer, "linear_attention" (state-space) or "full_attention"; None: seven to one.
    layer_types: list[str] | None = None
    # What follows the mixer in each layer, an FFN ("dense") or experts ("sparse"); None: the latter if there are any.
    mlp_layer_types: list[str] | None = None
    # Experts of a sparse layer, each a SwiGLU FFN.
    num_experts: int = 0
    # Experts that compute each token, weighted by the softmax of their logits.
    num_experts_per_tok: int = 2
    # Inner channels of each expert; None: intermediate_size.
    moe_intermediate_size: int | None = None
    # Those of an expert that computes every token; 0: none.
    shared_expert_intermediate_size: int = 0
    # Whether the router's logits are returned; then the loss includes their load balance (arXiv:2101.03961), times
    # router_aux_loss_coef.
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    # Position encoding of attention layers: "rope" or "none".
    attention_position_encoding: str = "rope"
    # Position encoding of state-space layers: "rope" (Unified RoPE), "conv1d_d" (Mamba-2's convolution and skip D) or
    # "a_t" (only the decay).
    position_encoding: str = "rope"
    # Channels of the recurrent state per head channel (d_state).
    state_size: int = 128
    # None: hidden_size / state_head_dim.
    state_num_heads: int | None = None
    state_head_dim: int = 64
    # Groups of heads that share B and C.
    state_num_groups: int = 4
    # Mamba-2's output gate and grouped RMSNorm.
    state_gated: bool = False
    # A learned bias under the softplus of dt.
    state_dt_bias: bool = True
    # Taps of the causal convolution of "conv1d_d".
    conv_kernel: int = 4
    # Tokens per chunk of the parallel scan; affects speed and memory, not the function.
    chunk_size: int = 256
    # Tokens beyond which C is scaled by log_base(position) (appendix A); None: never.
    length_scaling_base: int | None = None
    # {"rope_type": "default" or "linear", "rope_theta": base, "factor": divisor of positions under "linear"}
    rope_parameters: dict[str, Any] | None = None
    # Precision of the angles: "fp32", as in Megatron, or "fp64", exact at any position.
    rotary_table_precision: str = "fp32"
    # Tokens per training sample; longer texts are allowed.
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [_MODULE[index % len(_MODULE)] for index in range(self.num_hidden_layers)]
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse" if self.num_experts else "dense"] * self.num_hidden_layers
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.state_num_heads = self.state_num_heads or self.hidden_size // self.state_head_dim
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """`strict` calls it whenever a configuration is created."""
        choices = {
            "attention_position_encoding": ("rope", "none"),
            "position_encoding": ("rope", "conv1d_d", "a_t"),
            "rotary_table_precision": ("fp32", "fp64"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")
        if strangers := set(self.layer_types or ()) - set(_MODULE):
            raise ValueError(f"layer_types holds {sorted(strangers)}; use {' and '.join(sorted(set(_MODULE)))}")
        self._check_experts()
        for name, of in (("state_num_groups", "state_num_heads"), ("num_key_value_heads", "num_attention_heads")):
            if getattr(self, of) % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} does not divide {of}={getattr(self, of)}")
        check_rope_type(self.rope_parameters or {})

    def _check_experts(self) -> None:
        kinds = self.mlp_layer_types or []
        if strangers := set(kinds) - {"dense", "sparse"}:
            raise ValueError(f"mlp_layer_types holds {sorted(strangers)}; use dense and sparse")
        if len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"mlp_layer_types has {len(kinds)} entries, not num_hidden_layers={self.num_hidden_layers}; use one "
                "for each layer"
            )
        if "sparse" in kinds and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} does not fit num_experts={self.num_experts}; "
                "use at least 1 and at most all of them"
            )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """transformers' own, plus the model's code, for users without this package."""
        if self.write_code is not None:
            self.auto_map = self.write_code(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)

    @property
    def has_attention(self) -> bool:
        return "full_attention" in (self.layer_types or ())

    @property
    def has_experts(self) -> bool:
        return "sparse" in (self.mlp_layer_types or ())

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a layer has experts in place of an FFN."""
        return (self.mlp_layer_types or ())[layer_idx] == "sparse"

    @property
    def state_inner_size(self) -> int:
        """Channels of x in a state-space layer, over all heads."""
        return (self.state_num_heads or 0) * self.state_head_dim

    @property
    def in_proj_sizes(self) -> dict[str, int]:
        """Rows of a state-space layer's in-projection by component, in order."""
        sizes = {"z": self.state_inner_size} if self.state_gated else {}
        group_channels = self.state_num_groups * self.state_size
        sizes |= {"x": self.state_inner_size, "B": group_channels, "C": group_channels}
        return sizes | {"dt": self.state_num_heads or 0}


def check_rope_type(rope_parameters: dict[str, Any]) -> None:
    """ValueError unless it is one of ROPE_TYPES."""
    rope_type = rope_parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"rope_type={rope_type!r} changes or scales the rotation in a way that a state-space layer's state "
            f"cannot follow; use one of {', '.join(ROPE_TYPES)}"
        )
