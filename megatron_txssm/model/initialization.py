"""Initial weights that do not depend on the parallel layout.

Megatron seeds each rank's generator by its place in the layout, so the same seed starts another model at TP=2 than at
TP=1. Here a parameter's initial value is a function of the seed and of the parameter's name and global shape in the
checkpoint.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import nested_values
from torch import Tensor

from megatron_txssm.model.state_space_mixer import StateSpaceMixer, parameter_initializers

# Rows drawn at a time. Only the embedding's number of rows depends on the layout (padding); its first rows do not.
ROWS_PER_DRAW = 128


@torch.no_grad()
def initialize_by_name(model: Any, seed: int) -> None:
    """Fill every parameter of this rank's GPTModel in place, by Megatron's own init functions of its config."""
    rules = _rules(model)
    for entry in nested_values(model.sharded_state_dict()):
        for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            if isinstance(shard, ShardedTensor) and (rule := _rule(rules, shard.key)):
                assert shard.data is not None and not shard.data.is_meta, f"{shard.key} has no memory to fill"
                where = tuple(
                    slice(start, start + length)
                    for start, length in zip(shard.global_offset, shard.local_shape, strict=True)
                )
                shard.data.copy_(_draw(rule, shard, seed)[where])


def _rules(model: Any) -> dict[str, Callable[[Tensor], Any]]:
    """The init function by the end of the parameter's name; what is not listed (norms: ones) stays as built."""
    config = model.config
    rules = {
        "linear_proj.weight": config.output_layer_init_method,
        "linear_fc2.weight": config.output_layer_init_method,
        "out_proj.weight": config.output_layer_init_method,
        "word_embeddings.weight": config.embedding_init_method,
        "output_layer.weight": config.init_method,
        "linear_qkv.weight": config.init_method,
        "linear_fc1.weight": config.init_method,
        **{f"in_proj.weight.{part}": config.init_method for part in ("z", "x", "B", "C", "dt")},
    }
    for mixer in (module for module in model.modules() if isinstance(module, StateSpaceMixer)):
        for name, rule in parameter_initializers(mixer.state_space).items():
            parts = [f".{part}" for part in mixer.conv_sizes] if name.startswith("conv1d") else [""]
            rules.update({name + part: rule for part in parts})
    return rules


def _rule(rules: dict[str, Callable[[Tensor], Any]], key: str) -> Callable[[Tensor], Any] | None:
    return next((rule for suffix, rule in rules.items() if f".{key}".endswith(f".{suffix}")), None)


def _draw(rule: Callable[[Tensor], Any], shard: ShardedTensor, seed: int) -> Tensor:
    """The whole parameter, fp32, from a generator seeded by `seed` and the parameter's name."""
    digest = hashlib.sha256(f"{seed}:{shard.key}".encode()).digest()
    whole = torch.empty(shard.global_shape, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        for rows in whole.split(ROWS_PER_DRAW):
            rule(rows)
    return whole
