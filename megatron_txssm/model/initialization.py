"""Initial weights that do not depend on the parallel layout.

Megatron seeds each rank's generator by the rank's place in the layout, so the same seed gives different models at TP=1
and TP=2. Here a parameter's initial value is a function of the seed and of the parameter's name and global shape in
the checkpoint; the name is the one that it had in earlier versions (architecture/former_names.py).

The numbers come from torch's CPU generator; its GPU generator would draw others. Every rank draws small parameters
whole. Of a large parameter, a rank draws only the rows that it holds a part of, in several threads, each with a
generator moved ahead: bitwise the same numbers as one whole draw.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_txssm.architecture.former_names import former_name
from megatron_txssm.architecture.layer_pattern import layers
from megatron_txssm.model.mersenne_twister import generators_ahead
from megatron_txssm.model.shards import model_shards
from megatron_txssm.model.state_space_mixer import StateSpaceMixer
from megatron_txssm.model.state_space_parameters import parameter_initializers

# Rows per draw. Only the embedding's number of rows depends on the layout (padding); its first rows do not.
ROWS_PER_DRAW = 128

# The minimum per thread: 0.1 s of drawing, against 10 ms to move its generator ahead.
NUMBERS_PER_THREAD = 1 << 25
MOST_THREADS = 16

# torch makes normal numbers from uniform ones in groups of 16, one 32-bit draw each; a remainder costs extra draws.
NUMBERS_AT_ONCE = 16


@torch.no_grad()
def initialize_by_name(model: Any, seed: int) -> None:
    """Fill every parameter of this rank's HybridModel in place, with the init functions of Megatron's config."""
    rules, all_layers = _rules(model), layers(model.hybrid_layer_pattern)
    for shard in model_shards(model):
        if rule := _rule(rules, shard.key):
            assert shard.data is not None and not shard.data.is_meta, f"{shard.key} has no memory to fill"
            # Each expert is a parameter of its own.
            expert = "".join(f".{number}" for number in shard.global_offset[: shard.prepend_axis_num])
            shard.data.copy_(_draw(rule, shard, f"{seed}:{former_name(shard.key, all_layers)}{expert}"))


def _rules(model: Any) -> dict[str, Callable[[Tensor], Any]]:
    """Parameter name suffix -> init function; parameters not listed (norms: ones) stay as built.

    Under muP (arXiv:2203.03466, table 8), Megatron's functions divide by √m, where m = hidden_size over the base's.
    A random matrix of standard deviation σ gives outputs of √n·σ from n inputs; an update of Adam, whose entries agree
    with the inputs, gives n times its learning rate. So every matrix that sums over n ~ m channels needs σ ~ 1/√m and a
    learning rate ~ 1/m: all components of the in-projection, the out-projection, Q, K, V, FFN, experts and router. What
    sums over a fixed number has neither: C·B over the state, Q·K over a head's channels (1/√d stays), the convolution
    over its taps; nor do A_log, dt_bias, D and norms, with one number per head or channel. Embedding and LM head keep
    both, and the logits are divided by m.

    B, C and router have few outputs, which table 8 would start at σ ~ 1/m. But C·B would then start at 1/m of the
    base's, near zero, where neither has a gradient; with 1/√m it starts alike at all widths, and stays so
    (tools/check_mup.py).
    """
    config = model.config
    rules = {
        "linear_proj.weight": config.output_layer_init_method,
        "linear_fc2.weight": config.output_layer_init_method,
        "out_proj.weight": config.output_layer_init_method,
        "word_embeddings.weight": config.embedding_init_method,
        # As wide a range at every width under muP, whose factor of the logits keeps them small.
        "output_layer.weight": config.embedding_init_method if config.use_mup else config.init_method,
        "linear_qkv.weight": config.init_method,
        "linear_fc1.weight": config.init_method,
        "router.weight": config.init_method,
        "eh_proj.weight": config.init_method,
        **{f"in_proj.weight.{part}": config.init_method for part in ("z", "x", "B", "C", "dt")},
    }
    for mixer in (module for module in model.modules() if isinstance(module, StateSpaceMixer)):
        for name, rule in parameter_initializers(mixer.state_space).items():
            parts = [f".{part}" for part in mixer.conv_sizes] if name.startswith("conv1d") else [""]
            rules.update({name + part: rule for part in parts})
    return rules


def _rule(rules: dict[str, Callable[[Tensor], Any]], key: str) -> Callable[[Tensor], Any] | None:
    return next((rule for suffix, rule in rules.items() if f".{key}".endswith(f".{suffix}")), None)


def _draw(rule: Callable[[Tensor], Any], shard: ShardedTensor, seed: str) -> Tensor:
    """A parameter's shard, fp32, from a generator seeded by a text."""
    digest = hashlib.sha256(seed.encode()).digest()
    number = int.from_bytes(digest[:8], "big", signed=True)
    shape = shard.global_shape[shard.prepend_axis_num :]
    where: Any = shard.global_slice()[shard.prepend_axis_num :]
    # Drawing in parts requires a rule whose use of the generator is known.
    normal = isinstance(rule, functools.partial) and rule.func is torch.nn.init.normal_
    large = len(shape) == 2 and shape[0] * shape[1] >= NUMBERS_PER_THREAD
    if normal and large and shape[1] % NUMBERS_AT_ONCE == 0:
        return _draw_part(rule, shape[1], where[0], where[1], number)
    whole = torch.empty(shape, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number)
        for rows in whole.split(ROWS_PER_DRAW):
            rule(rows)
    return whole[where]


def _draw_part(rule: Callable[..., Any], width: int, rows: slice, columns: slice, seed: int) -> Tensor:
    """Rows and columns of a matrix of `width` columns, which is filled row by row."""
    part = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.float32)

    def draw(generator: torch.Generator, own: Tensor) -> None:
        block = torch.empty(ROWS_PER_DRAW, width, dtype=torch.float32)
        for some in own.split(ROWS_PER_DRAW):
            some.copy_(rule(block[: len(some)], generator=generator)[:, columns])

    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS, max(1, len(part) * width // NUMBERS_PER_THREAD))
    shares = part.split(max(1, -(-len(part) // threads)))
    generators = generators_ahead(seed, rows.start * width, len(shares[0]) * width, len(shares))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(draw, generators, shares))
    return part
