"""Parameter counts of a model from its sizes, without torch. tests/planning holds them against the meta-device model.

H=attention heads  G=query groups  K=channels per head  D=hidden size  F=FFN channels  V=padded vocabulary
"""

from argparse import Namespace
from dataclasses import dataclass

from megatron_txssm.architecture.layer_pattern import ATTENTION, STATE_SPACE, layer_kinds
from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.recipe.recipe import Recipe


@dataclass(frozen=True)
class ModelSizes:
    """What the counts need to know of a model."""

    # One letter per layer, S or A.
    layer_kinds: str
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    # Rows of the embedding, with padding.
    vocab_size: int
    tie_embeddings: bool
    # None where no layer is of kind S.
    state_space: StateSpaceConfig | None

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "ModelSizes":
        model = recipe.model
        return cls(
            layer_kinds=recipe.layer_kinds,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups or model.num_attention_heads,
            kv_channels=recipe.kv_channels,
            vocab_size=recipe.padded_vocab_size,
            tie_embeddings=model.tie_embeddings,
            state_space=recipe.state_space,
        )

    @classmethod
    def from_megatron(cls, args: Namespace) -> "ModelSizes":
        """From Megatron's validated arguments (with the tokenizer built: `padded_vocab_size` is known)."""
        from megatron_txssm.model.arguments import DEFAULTS, state_space_config

        kinds = layer_kinds(getattr(args, "layer_pattern", DEFAULTS["layer_pattern"]), args.num_layers)
        return cls(
            layer_kinds=kinds,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
            kv_channels=args.kv_channels or args.hidden_size // args.num_attention_heads,
            vocab_size=args.padded_vocab_size,
            tie_embeddings=not args.untie_embeddings_and_output_weights,
            state_space=state_space_config(args) if STATE_SPACE in kinds else None,
        )

    @property
    def attention_weights(self) -> int:
        """Weights of one attention layer's projections: Q and output D·H·K each, K and V D·G·K each. No biases."""
        return 2 * self.hidden_size * self.kv_channels * (self.num_attention_heads + self.num_query_groups)

    @property
    def ffn_weights(self) -> int:
        """Weights of one SwiGLU FFN: gate, up and down, D·F each."""
        return 3 * self.hidden_size * self.ffn_hidden_size


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model by part; a shared tensor counts once."""

    embedding: int
    # 0 where the embedding serves as LM head.
    output: int
    # The mixers of all layers of a kind.
    state_space: int
    attention: int
    ffn: int
    # RMSNorm weights: two per layer and the final one.
    norms: int

    @property
    def total(self) -> int:
        return self.embedding + self.output + self.state_space + self.attention + self.ffn + self.norms


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of one checkpoint: weights in the model's precision, Adam's two moments and the optimizer's weights in fp32.

    Random states, tokens and the index are left out; they are megabytes.
    """
    weight = 2 if recipe.training.precision == "bf16" else 4
    return (weight + 12) * count_parameters(recipe).total


def count_parameters(model: Recipe | ModelSizes) -> ParameterCount:
    """Parameters by part, over all processes."""
    sizes = ModelSizes.from_recipe(model) if isinstance(model, Recipe) else model
    num_layers = len(sizes.layer_kinds)
    embedding = sizes.vocab_size * sizes.hidden_size
    mixer = sizes.state_space.num_params() if sizes.state_space else 0
    return ParameterCount(
        embedding=embedding,
        output=0 if sizes.tie_embeddings else embedding,
        state_space=sizes.layer_kinds.count(STATE_SPACE) * mixer,
        attention=sizes.layer_kinds.count(ATTENTION) * sizes.attention_weights,
        ffn=num_layers * sizes.ffn_weights,
        norms=(2 * num_layers + 1) * sizes.hidden_size,
    )
