"""What one rank holds of a model under a layout: sizes, tokens, and the layers of its pipeline stages."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property

from megatron_txssm.architecture.layer_pattern import in_stages, stages, without_depths
from megatron_txssm.architecture.parameters import ModelSizes
from megatron_txssm.planning.layouts import Layout
from megatron_txssm.recipe.recipe import Recipe

# Rows of a state-space layer's in-projection are padded to a multiple of this (model/state_space_parameters.py).
ROWS_MULTIPLE = 32


# Compared by identity: the caches of what is computed from a share are keyed by it.
@dataclass(frozen=True, eq=False)
class Share:
    """One rank's part of each layer, for one micro-batch. Sizes in elements, over this tensor-parallel rank's part.

    Attributes:
        tokens: of a micro-batch on this context-parallel rank
        seq_length: of a whole sample
        element: bytes of a weight or an activation
        fp8: whether the layers' GEMMs multiply in FP8
        muon_steps: Newton-Schulz steps of Muon, which updates the matrices; 0: AdamW does
        selective: Megatron's names of what selective recomputation repeats
    """

    sizes: ModelSizes
    tensor: int
    context: int
    expert: int
    sequence_parallel: bool
    state_context: str
    samples: int
    seq_length: int
    element: int
    fp8: bool
    fp8_attention: bool
    muon_steps: int
    selective: frozenset[str]

    @cached_property
    def tokens(self) -> int:
        return self.samples * self.seq_length // self.context

    @cached_property
    def own_tokens(self) -> int:
        """Tokens of norms and residuals: sequence parallelism divides them."""
        return self.tokens // self.tensor if self.sequence_parallel else self.tokens

    @property
    def hidden(self) -> int:
        return self.sizes.hidden_size

    @cached_property
    def ffn(self) -> int:
        return self.sizes.ffn_hidden_size // self.tensor

    @cached_property
    def heads(self) -> int:
        return self.sizes.num_attention_heads // self.tensor

    @cached_property
    def query(self) -> int:
        """Channels of the queries."""
        return self.heads * self.sizes.kv_channels

    @cached_property
    def key(self) -> int:
        """Channels of the keys, and of the values."""
        return self.sizes.num_query_groups * self.sizes.kv_channels // self.tensor

    @cached_property
    def vocabulary(self) -> int:
        return self.sizes.vocab_size // self.tensor

    @cached_property
    def inner(self) -> int:
        """Channels of a state-space layer's x."""
        return self.sizes.state_space.inner_size // self.tensor if self.sizes.state_space else 0

    @cached_property
    def state_heads(self) -> int:
        return self.sizes.state_space.num_heads // self.tensor if self.sizes.state_space else 0

    @cached_property
    def groups(self) -> int:
        """Channels of a state-space layer's B, and of its C."""
        state = self.sizes.state_space
        return state.num_groups * state.state_size // self.tensor if state else 0

    @cached_property
    def packed(self) -> int:
        """Rows of the in-projection, with padding."""
        state = self.sizes.state_space
        rows = sum(state.in_proj_sizes.values()) // self.tensor if state else 0
        return math.ceil(rows / ROWS_MULTIPLE) * ROWS_MULTIPLE

    @cached_property
    def fused_scan(self) -> bool:
        """Whether one autograd function computes all between a state-space layer's projections."""
        state = self.sizes.state_space
        plain = state is not None and not state.gated and not state.conv_sizes and state.length_scaling_base is None
        return plain and self.context == 1 and self.element == 2

    @cached_property
    def routed(self) -> int:
        """Tokens that this rank's experts compute, if the load is even: each token counts once for each expert."""
        return self.own_tokens * self.sizes.experts.topk * self.tensor if self.sizes.experts else 0

    @cached_property
    def expert_ffn(self) -> int:
        return self.sizes.experts.ffn_hidden_size // self.tensor if self.sizes.experts else 0

    @cached_property
    def shared_ffn(self) -> int:
        return self.sizes.experts.shared_ffn_hidden_size // self.tensor if self.sizes.experts else 0

    @cached_property
    def experts_per_rank(self) -> int:
        return self.sizes.experts.num_experts // self.expert if self.sizes.experts else 0


def share_of(recipe: Recipe, layout: Layout) -> Share:
    training = recipe.training
    return Share(
        sizes=recipe.sizes,
        tensor=layout.tensor,
        context=layout.context,
        expert=layout.expert,
        sequence_parallel=layout.sequence_parallel,
        state_context=layout.state_context,
        samples=layout.micro_batch,
        seq_length=training.seq_length,
        element=2 if training.precision == "bf16" else 4,
        fp8=training.fp8 is not None,
        fp8_attention=training.fp8_attention,
        muon_steps=recipe.optimizer.muon_num_ns_steps if recipe.optimizer.name == "muon" else 0,
        selective=frozenset(recipe.megatron.get("recompute_modules") or ("core_attn",)),
    )


# Compared by identity, as Share is.
@dataclass(frozen=True, eq=False)
class Stage:
    """What a pipeline rank holds: the layers of each of its virtual stages, and whether it has an end of the model.

    Attributes:
        chunks: the layers of each virtual stage, one symbol each
        embeds: whether it holds the embedding
        predicts: whether it holds the final norm, the LM head and the prediction depths
    """

    chunks: tuple[str, ...]
    embeds: bool
    predicts: bool

    @cached_property
    def counts(self) -> Counter[str]:
        """Layers of each kind, over all virtual stages."""
        return Counter("".join(self.chunks))


@dataclass(frozen=True)
class KindOfStage:
    """Ranks that hold the same: the first of them, and how many there are."""

    stage: Stage
    first: int
    count: int


@dataclass(frozen=True)
class Stages:
    """The pipeline's ranks, in order, and the kinds of them."""

    of_rank: tuple[Stage, ...]
    kinds: tuple[KindOfStage, ...]


def pipeline_stages(recipe: Recipe, pipeline: int, virtual: int) -> Stages:
    """What each rank of the pipeline holds; the layers must be divisible."""
    written = in_stages(without_depths(recipe.model.layer_pattern), pipeline * virtual)
    assert written is not None, "a legal layout divides the layers"
    parts = stages(written)
    by_content: dict[tuple[tuple[str, ...], bool, bool], Stage] = {}
    of_rank: list[Stage] = []
    for rank in range(pipeline):
        content = (tuple(parts[rank::pipeline]), rank == 0, rank == pipeline - 1)
        of_rank.append(by_content.setdefault(content, Stage(*content)))
    kinds = [KindOfStage(stage, of_rank.index(stage), of_rank.count(stage)) for stage in by_content.values()]
    return Stages(tuple(of_rank), tuple(kinds))


@cache
def chunks_in_flight(pipeline: int, virtual: int, rank: int, micro_batches: int) -> tuple[int, ...]:
    """Of each virtual stage of a pipeline rank: for how many micro-batches its activations are kept at most at once.

    Megatron's schedules: 1F1B runs pipeline - rank micro-batches ahead; the interleaved one 2·(pipeline - rank - 1)
    chunks more than its virtual stages' first rounds (megatron.core.pipeline_parallel.schedules).
    """
    if virtual == 1:
        return (min(micro_batches, pipeline - rank),)
    total = micro_batches * virtual
    ahead = min(total, (pipeline - rank - 1) * 2 + (virtual - 1) * pipeline + 1)
    counts = [0] * virtual
    for number in range(ahead):
        counts[number // pipeline % virtual] += 1
    return tuple(counts)
