"""One table per format: which tensors of Megatron's checkpoint map to which of a Hugging Face model, and how.

Both directions use the same rows. `*` is the number of a block: one layer of a Hugging Face model, and two of
Megatron's, a mixer and an FFN or experts. A row applies to the blocks that have its tensors; of
several Megatron tensors, those that a variant lacks (the gate's z) are omitted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_txssm.architecture.parameters import ModelSizes
from megatron_txssm.checkpoint.tensors import NamedTensors, Shape, layer_of

if TYPE_CHECKING:
    import torch

# One or several tensors.
type Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Transform:
    """Megatron's tensors to Hugging Face's and back. `exact`: the round trip preserves all bits."""

    to_hf: Callable[[Tensors, ModelSizes], Tensors]
    # The last argument: the shapes on Megatron's side.
    from_hf: Callable[[Tensors, ModelSizes, Sequence[Shape]], Tensors]
    exact: bool = True


def _concat(tensors: Tensors, sizes: ModelSizes) -> Tensors:
    import torch

    return [torch.cat(tensors)]


def _split_as(tensors: Tensors, sizes: ModelSizes, shapes: Sequence[Shape]) -> Tensors:
    return list(tensors[0].split([shape[0] for shape in shapes]))


def _split_qkv(tensors: Tensors, sizes: ModelSizes) -> Tensors:
    """[Q heads, K, V] for each query group → Q, K, V."""
    groups, heads = sizes.num_query_groups, sizes.num_attention_heads // sizes.num_query_groups
    by_group = tensors[0].unflatten(0, (groups, heads + 2, sizes.kv_channels))
    return [part.flatten(0, 2) for part in by_group.split([heads, 1, 1], dim=1)]


def _join_qkv(tensors: Tensors, sizes: ModelSizes, shapes: Sequence[Shape]) -> Tensors:
    import torch

    parts = [tensor.unflatten(0, (sizes.num_query_groups, -1, sizes.kv_channels)) for tensor in tensors]
    return [torch.cat(parts, dim=1).flatten(0, 2)]


def _ones(tensors: Tensors, sizes: ModelSizes) -> Tensors:
    import torch

    return [torch.ones(sizes.hidden_size)]


def _only_ones(tensors: Tensors, sizes: ModelSizes, shapes: Sequence[Shape]) -> Tensors:
    if not bool((tensors[0] == 1).all()):
        raise ValueError("holds scales other than one, which our layers do not have")
    return []


def _decay_rate(tensors: Tensors, sizes: ModelSizes) -> Tensors:
    return [-tensors[0].float().exp()]


def _log_decay_rate(tensors: Tensors, sizes: ModelSizes, shapes: Sequence[Shape]) -> Tensors:
    if not bool((tensors[0] < 0).all()):
        raise ValueError("holds rates of 0 and above: states that grow, which A = -exp(A_log) cannot express")
    return [(-tensors[0].float()).log()]


def _times_multiplier(tensors: Tensors, sizes: ModelSizes) -> Tensors:
    """In fp32, where a bf16 weight's product keeps its digits."""
    return tensors if sizes.logits_multiplier == 1 else [tensors[0].float() * sizes.logits_multiplier]


def _without_multiplier(tensors: Tensors, sizes: ModelSizes, shapes: Sequence[Shape]) -> Tensors:
    return tensors if sizes.logits_multiplier == 1 else [tensors[0].float() / sizes.logits_multiplier]


SAME = Transform(lambda tensors, sizes: tensors, lambda tensors, sizes, shapes: tensors)
CONCAT = Transform(_concat, _split_as)
# Gate and up-projection: stacked in Megatron, separate in Hugging Face.
HALVES = Transform(
    lambda tensors, sizes: list(tensors[0].chunk(2)), lambda tensors, sizes, shapes: _concat(tensors, sizes)
)
QKV = Transform(_split_qkv, _join_qkv)
# A scale that is always one.
ONES = Transform(_ones, _only_ones)
# A_log → A = -exp(A_log); the logarithm may differ in the last bit.
DECAY_RATE = Transform(_decay_rate, _log_decay_rate, exact=False)

# The last norm also has muP's factor of the logits, which no class of transformers knows.
LAST_NORM = Transform(_times_multiplier, _without_multiplier, exact=False)


@dataclass(frozen=True)
class Row:
    """Corresponding tensors: Megatron's names, Hugging Face's names, the transform between them."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    transform: Transform = SAME


def _row(megatron: str, hf: str, transform: Transform = SAME) -> Row:
    """Names are separated by spaces. `@`: a layer (Megatron's: the FFN's or experts'), `$`: a state-space mixer,
    `&`: attention.
    """
    megatron = megatron.replace("@", "decoder.layers.(2*+1).").replace("$", "decoder.layers.(2*).mixer.")
    megatron = megatron.replace("&", "decoder.layers.(2*).self_attention.")
    return Row(tuple(megatron.split()), tuple(hf.replace("@", "model.layers.*.").split()), transform)


_EMBEDDINGS = (
    _row("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    _row("decoder.final_norm.weight", "model.norm.weight", LAST_NORM),
    _row("output_layer.weight", "lm_head.weight"),
)
_NORMS = (
    _row("$in_proj.layer_norm_weight", "@input_layernorm.weight"),
    _row("&linear_qkv.layer_norm_weight", "@input_layernorm.weight"),
    _row("@mlp.linear_fc1.layer_norm_weight", "@post_attention_layernorm.weight"),
    _row("@pre_mlp_layernorm.weight", "@post_attention_layernorm.weight"),
)
_ATTENTION = (
    _row(
        "&linear_qkv.weight",
        "@self_attn.q_proj.weight @self_attn.k_proj.weight @self_attn.v_proj.weight",
        QKV,
    ),
    _row("&linear_proj.weight", "@self_attn.o_proj.weight"),
)
_MLP = (
    _row("@mlp.linear_fc1.weight", "@mlp.gate_proj.weight @mlp.up_proj.weight", HALVES),
    _row("@mlp.linear_fc2.weight", "@mlp.down_proj.weight"),
)
_EXPERTS = (
    _row("@mlp.router.weight", "@mlp.gate.weight"),
    _row("@mlp.experts.experts.linear_fc1.weight", "@mlp.experts.gate_up_proj"),
    _row("@mlp.experts.experts.linear_fc2.weight", "@mlp.experts.down_proj"),
    _row(
        "@mlp.shared_experts.linear_fc1.weight",
        "@mlp.shared_expert.gate_proj.weight @mlp.shared_expert.up_proj.weight",
        HALVES,
    ),
    _row("@mlp.shared_experts.linear_fc2.weight", "@mlp.shared_expert.down_proj.weight"),
)


def _state_space(mixer: str) -> tuple[Row, ...]:
    """Mamba-2's own names, in the module named `mixer`."""
    return (
        _row(
            "$in_proj.weight.z $in_proj.weight.x $in_proj.weight.B $in_proj.weight.C $in_proj.weight.dt",
            f"@{mixer}.in_proj.weight",
            CONCAT,
        ),
        _row("$conv1d_weight.x $conv1d_weight.B $conv1d_weight.C", f"@{mixer}.conv1d.weight", CONCAT),
        _row("$conv1d_bias.x $conv1d_bias.B $conv1d_bias.C", f"@{mixer}.conv1d.bias", CONCAT),
        _row("$A_log", f"@{mixer}.A_log"),
        _row("$dt_bias", f"@{mixer}.dt_bias"),
        _row("$D", f"@{mixer}.D"),
        _row("$norm_weight", f"@{mixer}.norm.weight"),
        _row("$out_proj.weight", f"@{mixer}.out_proj.weight"),
    )


# Format -> its table. "llama" and "granitemoehybrid" are classes of transformers itself, "transxssm" is ours (hf/),
# "reference" is the authors' public code (arXiv:2506.09507).
TABLES: dict[str, tuple[Row, ...]] = {
    "transxssm": (*_EMBEDDINGS, *_NORMS, *_ATTENTION, *_MLP, *_EXPERTS, *_state_space("mixer")),
    "llama": (*_EMBEDDINGS, *_NORMS, *_ATTENTION, *_MLP),
    "granitemoehybrid": (
        *_EMBEDDINGS,
        *_NORMS,
        *_ATTENTION,
        *_state_space("mamba"),
        _row("@mlp.linear_fc1.weight", "@shared_mlp.input_linear.weight"),
        _row("@mlp.linear_fc2.weight", "@shared_mlp.output_linear.weight"),
        _row("@mlp.shared_experts.linear_fc1.weight", "@shared_mlp.input_linear.weight"),
        _row("@mlp.shared_experts.linear_fc2.weight", "@shared_mlp.output_linear.weight"),
        # As in files; transformers renames them when it loads and saves.
        _row("@mlp.router.weight", "@block_sparse_moe.router.layer.weight"),
        _row("@mlp.experts.experts.linear_fc1.weight", "@block_sparse_moe.input_linear.weight"),
        _row("@mlp.experts.experts.linear_fc2.weight", "@block_sparse_moe.output_linear.weight"),
    ),
    "reference": (
        _row("embedding.word_embeddings.weight", "model.word_embed.weight"),
        _row("decoder.final_norm.weight", "model.final_layernorm.weight", LAST_NORM),
        _row("output_layer.weight", "lm_head.weight"),
        _row("$in_proj.layer_norm_weight", "@pre_sequence_layernorm.weight"),
        _row("&linear_qkv.layer_norm_weight", "@pre_sequence_layernorm.weight"),
        _row("@mlp.linear_fc1.layer_norm_weight", "@pre_state_layernorm.weight"),
        _row("$in_proj.weight.x", "@ssd.x_proj.weight"),
        _row("$in_proj.weight.B", "@ssd.b_proj.weight"),
        _row("$in_proj.weight.C", "@ssd.c_proj.weight"),
        _row("$in_proj.weight.dt", "@ssd.dt_proj.weight"),
        _row("$A_log", "@ssd.A", DECAY_RATE),
        _row("$out_proj.weight", "@ssd.out_proj.weight"),
        _row("&linear_qkv.weight", "@attn.q_proj.weight @attn.k_proj.weight @attn.v_proj.weight", QKV),
        _row("&linear_proj.weight", "@attn.o_proj.weight"),
        _row("@mlp.linear_fc1.weight", "@feed_forward.gate_proj.weight @feed_forward.up_proj.weight", HALVES),
        _row("@mlp.linear_fc2.weight", "@feed_forward.down_proj.weight"),
        _row("", "@post_sequence_residual.weight", ONES),
        _row("", "@post_state_residual.weight", ONES),
    ),
}


@dataclass(frozen=True)
class Group:
    """A row of the table for one layer of a model: the unit of conversion."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    transform: Transform
    # Shapes on Megatron's side.
    shapes: tuple[Shape, ...]

    def to_hf(self, tensors: NamedTensors, sizes: ModelSizes) -> NamedTensors:
        """The group's Hugging Face tensors, from Megatron's by name."""
        converted = self.transform.to_hf([tensors[name] for name in self.megatron], sizes)
        return {name: tensor.contiguous() for name, tensor in zip(self.hf, converted, strict=True)}

    def from_hf(self, tensors: NamedTensors, sizes: ModelSizes) -> NamedTensors:
        """The group's Megatron tensors, from Hugging Face's by name; ValueError if values have no counterpart."""
        converted = self.transform.from_hf([tensors[name] for name in self.hf], sizes, self.shapes)
        return dict(zip(self.megatron, converted, strict=True))


def plan(format: str, shapes: dict[str, Shape]) -> list[Group]:
    """The groups of a model in layer order; `shapes` are those of `model_shapes`.

    "megatron" is also a format: every tensor is kept as it is.
    """
    if format == "megatron":
        return [Group((name,), (name,), SAME, (shape,)) for name, shape in shapes.items()]
    blocks = len({layer for name in shapes if (layer := layer_of(name)) is not None}) // 2
    groups: list[Group] = []
    for row in TABLES[format]:
        for block in range(blocks) if "*" in row.hf[0] else [0]:
            mixer, ffn = str(2 * block), str(2 * block + 1)
            names = tuple(name.replace("(2*)", mixer).replace("(2*+1)", ffn) for name in row.megatron)
            there = tuple(name for name in names if name in shapes)
            if there or not names:
                hf = tuple(name.replace("*", str(block)) for name in row.hf)
                groups.append(Group(there, hf, row.transform, tuple(shapes[name] for name in there)))
    covered = [name for group in groups for name in group.megatron]
    assert sorted(covered) == sorted(shapes), f"layout {format} does not cover {set(shapes) ^ set(covered)}"
    places = {name: place for place, name in enumerate(shapes)}
    ends = {layer_of(name): place for name, place in places.items()}
    # Groups without Megatron tensors come at their block's end.
    return sorted(groups, key=lambda g: places[g.megatron[0]] if g.megatron else ends[2 * (layer_of(g.hf[0]) or 0) + 1])


def hf_tensors(
    groups: Sequence[Group], sizes: ModelSizes, dtype: "Callable[[str], torch.dtype | None]" = lambda name: None
) -> NamedTensors:
    """Hugging Face's tensors without data: the conversion, run on torch's meta device.

    `dtype`: that of each of Megatron's tensors; None: torch's default.
    """
    import torch

    tensors: NamedTensors = {}
    with torch.device("meta"):
        for group in groups:
            named = zip(group.megatron, group.shapes, strict=True)
            empty = {name: torch.empty(shape, dtype=dtype(name)) for name, shape in named}
            tensors |= group.to_hf(empty, sizes)
    return tensors
