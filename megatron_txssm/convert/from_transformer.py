"""A TransXSSM begun from a Transformer's weights: `txssm convert import HF OUT --as transxssm`.

Both kinds of layers rotate by position and sum the past: attention weighs V by softmax(Q·K), a state-space layer x by
C·B and its decay (arXiv:2506.09507, eq. 2 to 7). So Q becomes C, K becomes B, V becomes x, and the output projection
stays, as arXiv:2408.15237 does for Mamba without rotation. Decay and step size are initialised as in a new model.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from megatron_txssm.architecture.layer_pattern import ATTENTION, FFN, STATE_SPACE
from megatron_txssm.checkpoint.tensors import NamedTensors, Shape, Weights, model_shapes
from megatron_txssm.convert.formats.mapping import QKV
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.changes import changed
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.validation.validate import validate

if TYPE_CHECKING:
    import torch

# The paper's module: seven state-space layers, then one of attention.
PERIOD = 8
# A state-space layer's tensor -> attention's that it comes from.
_ORIGIN = {
    "in_proj.layer_norm_weight": "linear_qkv.layer_norm_weight",
    "in_proj.weight.C": "linear_qkv.weight",
    "in_proj.weight.B": "linear_qkv.weight",
    "in_proj.weight.x": "linear_qkv.weight",
    "out_proj.weight": "linear_proj.weight",
}


def transxssm_of(recipe: Recipe) -> Recipe:
    """The recipe of the TransXSSM that a Transformer's becomes: attention stays in every eighth block, or the last.

    Each head has a group of its own, since Q has a row of projections for each. UserError if the recipe's layers are
    not all attention with RoPE, each followed by an FFN.
    """
    blocks = len(recipe.layers) // 2
    if blocks < 2 or recipe.layers != (ATTENTION + FFN) * blocks or recipe.model.attention_position_encoding != "rope":
        raise UserError(
            f"--as transxssm: {recipe.name} has layers {recipe.layers}; only a Transformer can become one, with two or "
            "more blocks of attention with RoPE and an FFN"
        )
    stays = [block % PERIOD == PERIOD - 1 or (blocks < PERIOD and block == blocks - 1) for block in range(blocks)]
    sizes = recipe.sizes
    started = changed(
        recipe,
        {
            "name": f"{recipe.name}_transxssm",
            "description": f"TransXSSM begun from {recipe.name}",
            "model.layer_pattern": "".join((ATTENTION if here else STATE_SPACE) + FFN for here in stays),
            "model.position_encoding": "rope",
            "model.state_size": sizes.kv_channels,
            "model.state_head_dim": sizes.kv_channels,
            "model.state_num_heads": sizes.num_attention_heads,
            "model.state_num_groups": sizes.num_attention_heads,
        },
    )
    validate(started)
    return started


@dataclass(frozen=True)
class FromTransformer:
    """A Transformer's weights as those of the TransXSSM that `recipe` describes. See `tensors.Weights`."""

    transformer: Weights
    recipe: Recipe

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of the tensors that have an origin; all others are new."""
        shapes = model_shapes(self.recipe)
        return {name: shape for name, shape in shapes.items() if ".mixer." not in name or _origin(name)}

    def dtype(self, name: str) -> "torch.dtype":
        return self.transformer.dtype(_origin(name) or name)

    def read(self, names: Iterable[str]) -> NamedTensors:
        origins = {name: _origin(name) or name for name in names}
        found = self.transformer.read(dict.fromkeys(origins.values()))
        return {name: self._converted(name, found[origin]) for name, origin in origins.items()}

    def _converted(self, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
        _, packed, part = name.partition(".in_proj.weight.")
        if not packed:
            return tensor
        sizes = self.recipe.sizes
        query, key, value = QKV.to_hf([tensor], sizes)
        if part == "C":
            # Attention divides the products by this.
            return query / math.sqrt(sizes.kv_channels)
        # Heads that share a key and a value get a copy each.
        heads = (key if part == "B" else value).unflatten(0, (sizes.num_query_groups, sizes.kv_channels))
        return heads.repeat_interleave(sizes.num_attention_heads // sizes.num_query_groups, dim=0).flatten(0, 1)


def _origin(name: str) -> str | None:
    """Attention's tensor that a state-space layer's comes from."""
    layer, _, own = name.partition(".mixer.")
    return f"{layer}.self_attention.{_ORIGIN[own]}" if own in _ORIGIN else None
