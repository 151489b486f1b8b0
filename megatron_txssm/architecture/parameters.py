"""Parameter counts of a model from its sizes, without torch.

tests/architecture compares them with the model on the meta device.

H=attention heads  G=query groups  K=channels per head  D=hidden size  F=FFN channels  V=padded vocabulary
N=experts
"""

from dataclasses import dataclass

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.architecture.state_space_config import StateSpaceConfig


@dataclass(frozen=True)
class ExpertSizes:
    """The sizes of a layer of experts."""

    num_experts: int
    # Experts that compute each token.
    topk: int
    # Channels of each expert, a SwiGLU FFN.
    ffn_hidden_size: int
    # Those of the expert that computes every token; 0 without one.
    shared_ffn_hidden_size: int


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that determine the counts."""

    # One symbol per layer (layer_pattern.py).
    layers: str
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    # Rows of the embedding, with padding.
    vocab_size: int
    tie_embeddings: bool
    # None without state-space layers.
    state_space: StateSpaceConfig | None
    # None without experts.
    experts: ExpertSizes | None = None
    # The layers of each depth of multi-token prediction.
    prediction_depths: tuple[str, ...] = ()
    # muP's factor of the logits, which changes no count; 1 without muP.
    logits_multiplier: float = 1.0
    # Whether each layer has a norm before it.
    pre_norms: bool = True

    @property
    def attention_weights(self) -> int:
        """Weights of one attention layer's projections: Q and output D·H·K each, K and V D·G·K each. No biases."""
        return 2 * self.hidden_size * self.kv_channels * (self.num_attention_heads + self.num_query_groups)

    @property
    def ffn_weights(self) -> int:
        """Weights of one SwiGLU FFN: gate, up and down, D·F each."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def all_layers(self) -> str:
        """The model's layers and those of its prediction depths."""
        return "".join((self.layers, *self.prediction_depths))

    @property
    def prediction_weights(self) -> int:
        """Weights of one prediction depth's projection of embedding and hidden state, 2·D·D."""
        return 2 * self.hidden_size**2

    @property
    def expert_weights(self) -> int:
        """Weights of one layer of experts: router N·D, each expert 3·D·F, and the shared one."""
        return self._expert_weights(self.experts.num_experts) if self.experts else 0

    @property
    def active_expert_weights(self) -> int:
        """Those that a token uses: router, `topk` experts, and the shared one."""
        return self._expert_weights(self.experts.topk) if self.experts else 0

    def _expert_weights(self, count: int) -> int:
        assert self.experts is not None
        channels = count * self.experts.ffn_hidden_size + self.experts.shared_ffn_hidden_size
        return (self.experts.num_experts + 3 * channels) * self.hidden_size


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model by part, prediction depths included; a shared tensor counts once."""

    embedding: int
    # 0 if the embedding is also the LM head.
    output: int
    # The mixers of all layers of each kind.
    state_space: int
    attention: int
    ffn: int
    experts: int
    # RMSNorm weights: one per layer and the final one; three more per prediction depth.
    norms: int
    # The projections of the prediction depths.
    prediction: int
    # Of `experts`, those that a token does not use.
    inactive: int

    @property
    def total(self) -> int:
        mixers = self.state_space + self.attention
        return self.embedding + self.output + mixers + self.ffn + self.experts + self.norms + self.prediction

    @property
    def active(self) -> int:
        """The parameters that a token uses."""
        return self.total - self.inactive


def count_parameters(sizes: ModelSizes) -> ParameterCount:
    """Parameters by part, over all processes."""
    embedding = sizes.vocab_size * sizes.hidden_size
    mixer = sizes.state_space.num_params() if sizes.state_space else 0
    layers, depths = sizes.all_layers, len(sizes.prediction_depths)
    expert_layers = layers.count(EXPERTS)
    return ParameterCount(
        embedding=embedding,
        output=0 if sizes.tie_embeddings else embedding,
        state_space=layers.count(STATE_SPACE) * mixer,
        attention=layers.count(ATTENTION) * sizes.attention_weights,
        ffn=layers.count(FFN) * sizes.ffn_weights,
        experts=expert_layers * sizes.expert_weights,
        norms=(len(layers) * sizes.pre_norms + 1 + 3 * depths) * sizes.hidden_size,
        prediction=depths * sizes.prediction_weights,
        inactive=expert_layers * (sizes.expert_weights - sizes.active_expert_weights),
    )
