"""A model's tensors by their names in Megatron's checkpoint, and how a conversion iterates over them.

They are a HybridModel's at TP=1, with these exceptions. The norm before a linear layer is named after it, because
Transformer Engine fuses the two: `mlp.linear_fc1.layer_norm_weight`. Tensors that a state-space layer packs per
tensor-parallel rank are stored by component: `in_proj.weight.x`, `.B`, `.C`, `.dt` (with a gate, `.z` first), and for a
convolution `conv1d_weight.x`, `.B`, `.C`; concatenated in this order, they give the packed tensor at TP=1.
`mlp.linear_fc1.weight` holds the gate's rows, then those of the up-projection; `self_attention.linear_qkv.weight` holds
Q heads, K and V for each query group in turn.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from megatron_txssm.architecture.layer_pattern import ATTENTION, EXPERTS, FFN, STATE_SPACE
from megatron_txssm.architecture.parameters import ExpertSizes, ModelSizes
from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch

# Name on the command line -> torch's.
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# As in a bf16 model (model/state_space_parameters.py, FP32_PARAMETERS): decays compound over thousands of tokens.
KEPT_IN_FP32 = ("A_log", "dt_bias", "D")
# Of the prediction depths' tensors.
PREDICTION = "mtp."
EMBEDDING, OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"

Shape = tuple[int, ...]
# Name -> tensor.
type NamedTensors = dict[str, torch.Tensor]


class Weights(Protocol):
    """A model's weights on disk in any format, under Megatron's names and without padding."""

    @property
    def recipe(self) -> Recipe: ...

    def dtype(self, name: str) -> "torch.dtype":
        """The dtype in which a tensor is stored."""
        ...

    def read(self, names: Iterable[str]) -> NamedTensors:
        """The named tensors, as stored; UserError if the files are damaged."""
        ...


def is_kept_in_fp32(name: str) -> bool:
    """`name` may be Megatron's or Hugging Face's."""
    return name.rpartition(".")[2] in KEPT_IN_FP32


def model_shapes(recipe: Recipe) -> dict[str, Shape]:
    """The shape of every tensor of a recipe's model, in layer order; vocabularies without padding.

    Without prediction depths, which only serve training: see `prediction_shapes`.
    """
    sizes = recipe.sizes
    hidden = sizes.hidden_size
    vocabulary = (recipe.data.vocab_size, hidden)
    shapes: dict[str, Shape] = {EMBEDDING: vocabulary}
    shapes |= _layers(sizes, sizes.layers, "decoder")
    shapes["decoder.final_norm.weight"] = (hidden,)
    return shapes if sizes.tie_embeddings else shapes | {OUTPUT_LAYER: vocabulary}


def prediction_shapes(sizes: ModelSizes) -> dict[str, Shape]:
    """The shapes of the prediction depths' own tensors."""
    hidden = sizes.hidden_size
    shapes: dict[str, Shape] = {}
    for number, layers in enumerate(sizes.prediction_depths):
        within = f"{PREDICTION}layers.{number}"
        shapes |= {f"{within}.{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "final_layernorm")}
        shapes[f"{within}.eh_proj.weight"] = (hidden, 2 * hidden)
        shapes |= _layers(sizes, layers, f"{within}.mtp_model_layer")
    return shapes


def _layers(sizes: ModelSizes, layers: str, within: str) -> dict[str, Shape]:
    parts = {ATTENTION: _attention(sizes), FFN: _ffn(sizes)}
    if sizes.experts is not None:
        parts[EXPERTS] = _experts(sizes.hidden_size, sizes.experts)
    if sizes.state_space is not None:
        parts[STATE_SPACE] = _state_space(sizes.state_space)
    return {
        f"{within}.layers.{number}.{name}": shape
        for number, layer in enumerate(layers)
        for name, shape in parts[layer].items()
        if sizes.pre_norms or not name.endswith("layer_norm_weight")
    }


def _attention(sizes: ModelSizes) -> dict[str, Shape]:
    hidden, channels = sizes.hidden_size, sizes.kv_channels
    return {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (
            (sizes.num_attention_heads + 2 * sizes.num_query_groups) * channels,
            hidden,
        ),
        "self_attention.linear_proj.weight": (hidden, sizes.num_attention_heads * channels),
    }


def _ffn(sizes: ModelSizes) -> dict[str, Shape]:
    hidden, ffn = sizes.hidden_size, sizes.ffn_hidden_size
    return {
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }


def _experts(hidden: int, experts: ExpertSizes) -> dict[str, Shape]:
    """All experts of a layer are one tensor, numbered by its first axis."""
    count, ffn, shared = experts.num_experts, experts.ffn_hidden_size, experts.shared_ffn_hidden_size
    shapes: dict[str, Shape] = {
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.router.weight": (count, hidden),
        "mlp.experts.experts.linear_fc1.weight": (count, 2 * ffn, hidden),
        "mlp.experts.experts.linear_fc2.weight": (count, hidden, ffn),
    }
    if shared:
        shapes |= {
            "mlp.shared_experts.linear_fc1.weight": (2 * shared, hidden),
            "mlp.shared_experts.linear_fc2.weight": (hidden, shared),
        }
    return shapes


def _state_space(mixer: StateSpaceConfig) -> dict[str, Shape]:
    heads = (mixer.num_heads,)
    shapes: dict[str, Shape] = {"in_proj.layer_norm_weight": (mixer.hidden_size,)}
    shapes |= {f"in_proj.weight.{part}": (rows, mixer.hidden_size) for part, rows in mixer.in_proj_sizes.items()}
    shapes |= {f"conv1d_weight.{part}": (rows, 1, mixer.conv_kernel) for part, rows in mixer.conv_sizes.items()}
    shapes |= {f"conv1d_bias.{part}": (rows,) for part, rows in mixer.conv_sizes.items()}
    shapes |= {"A_log": heads}
    shapes |= {"dt_bias": heads} if mixer.dt_bias else {}
    shapes |= {"D": heads} if mixer.conv_sizes else {}
    shapes |= {"norm_weight": (mixer.inner_size,)} if mixer.gated else {}
    shapes |= {"out_proj.weight": (mixer.hidden_size, mixer.inner_size)}
    return {f"mixer.{name}": shape for name, shape in shapes.items()}


def layer_of(name: str) -> int | None:
    """The layer number in a tensor's name, in any format."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found[1]) if found else None


def compare_shapes(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str | None:
    """The first fault of `found`, in one sentence without a period; None if it matches exactly."""
    missing = [name for name in wanted if name not in found]
    if missing:
        return f"{missing[0]} is missing" + (f", and {len(missing) - 1} other tensors" if len(missing) > 1 else "")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            return f"{name} is {_listed(found[name])}, not {_listed(shape)}"
    strangers = [name for name in found if name not in wanted]
    return f"{strangers[0]} is no tensor of this model" if strangers else None


def _listed(shape: Iterable[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
