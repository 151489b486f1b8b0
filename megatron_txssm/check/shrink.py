"""Shrinks a recipe: the same structure and the same legal layouts, in a model that trains in a second.

Sizes shrink to numbers that are divisible by the same parallel sizes, as far as these divide the number of processes;
small sizes are kept.
"""

import itertools
import json
import math
import re
from pathlib import Path

from megatron_txssm.architecture.layer_pattern import BORDER, DEPTH, MODULE, repeated_part, stages
from megatron_txssm.check.tokens import VOCAB_SIZE
from megatron_txssm.recipe.changes import (
    WITHOUT_FP8,
    WITHOUT_REPORTS,
    WITHOUT_TOKENIZER,
    WITHOUT_TOKENS,
    Changes,
    changed,
)
from megatron_txssm.recipe.recipe import Recipe

# Entries of a recipe's `megatron:` section that affect how gradients are computed; no entry changes the model.
_OF_THE_GRADIENTS = re.compile(
    r"overlap_grad_reduce|overlap_param_gather|ddp_bucket_size|ddp_num_buckets"
    r"|cp_comm_type|recompute_modules|accumulate_allreduce_grads_in_fp32"
)
# Two or more of the same part in a row.
_REPETITIONS = re.compile(r"(.+?)\1+")


def as_words(recipe: Recipe, changes: Changes) -> list[str]:
    """The changes that differ from the recipe, as command-line options."""
    words = []
    for dotted, value in changes.items():
        section, _, name = dotted.partition(".")
        fields = recipe.megatron if section == "megatron" else vars(getattr(recipe, section))
        if fields.get(name) != value:
            words += ["--set", f"{dotted}={value if isinstance(value, str) else json.dumps(value)}"]
    return words


def shrink(recipe: Recipe, tokens: Path, *, nproc: int, steps: int) -> Recipe:
    """The recipe for checks on up to `nproc` processes: small, fp32, on the token file of `write_tokens`."""
    changes = _model(recipe, nproc) | _training(recipe, nproc, steps) | _without_surroundings(recipe, tokens)
    return changed(recipe, changes)


def left_out(recipe: Recipe) -> list[str]:
    """The entries of a recipe's `megatron:` section that are dropped."""
    return [key for key in recipe.megatron if not _OF_THE_GRADIENTS.fullmatch(key)]


def _smaller(number: int, keep: int, at_least: int) -> int:
    """A number around `at_least` that has the same common divisors with `keep` as `number`."""
    if number <= 2 * at_least:
        return number
    common = math.gcd(number, keep)
    factors = (k for k in itertools.count(1) if math.gcd(k, keep) == 1 and common * k >= at_least)
    return common * next(factors)


def _model(recipe: Recipe, nproc: int) -> Changes:
    model = recipe.model
    query_groups = model.num_query_groups and _smaller(model.num_query_groups, nproc, at_least=4)
    if query_groups and model.num_query_groups:
        heads = query_groups * min(model.num_attention_heads // model.num_query_groups, 4)
    else:
        heads = _smaller(model.num_attention_heads, nproc, at_least=4)
    hidden_size, base = _smaller(model.hidden_size, 1, at_least=48), model.mup_base_hidden_size
    changes = {
        "layer_pattern": _layers(recipe, nproc),
        "hidden_size": hidden_size,
        "ffn_hidden_size": _smaller(model.ffn_hidden_size, 2 * nproc, at_least=64),
        **_experts(recipe, nproc),
        "num_attention_heads": heads,
        "num_query_groups": query_groups,
        "kv_channels": _smaller(recipe.kv_channels, 2, at_least=8),
        # Initial activations are as large as in the wide model.
        "init_method_std": model.init_method_std * math.sqrt(model.hidden_size / hidden_size),
        # As many times as wide as the base.
        "mup_base_hidden_size": base and max(1, round(base * hidden_size / model.hidden_size)),
        **_state_space(recipe, nproc),
    }
    return {f"model.{name}": value for name, value in changes.items()}


def _layers(recipe: Recipe, nproc: int) -> str:
    """The first repetitions of the pattern that the same pipeline sizes divide, with 1 or 2 stages per process.

    If the pattern is divided into stages, these are shortened one by one. Prediction depths stay as they are.
    """
    written, keep, layers = stages(recipe.model.layer_pattern), 2 * nproc, recipe.layers
    if len(written) > 1:
        shorter = BORDER.join(_shorter(written))
    else:
        period = len(repeated_part(layers))
        counts = range(period, len(layers) + 1, period)
        shorter = next(layers[:n] for n in counts if math.gcd(n, keep) == math.gcd(len(layers), keep))
    return DEPTH.join([shorter, *recipe.prediction_depths])


def _shorter(written: list[str]) -> list[str]:
    """Stages with fewer repetitions of their parts.

    Their number decides which layouts are legal, so it stays, as do the first and last layer of each, which stages are
    longer than others, and small patterns.
    """
    if sum(map(len, written)) <= len(MODULE):
        return written
    counts = sorted({_count(run) for stage in written for run in _REPETITIONS.finditer(stage)})

    def cut(least: int) -> list[str]:
        def some(run: re.Match[str]) -> str:
            return run[1] * min(_count(run), counts.index(_count(run)) + least)

        return [_REPETITIONS.sub(some, stage) for stage in written]

    shorter = next(some for some in map(cut, itertools.count(1)) if _by_length(some) == _by_length(written))
    return written if shorter == written else _shorter(shorter)


def _count(run: re.Match[str]) -> int:
    return len(run[0]) // len(run[1])


def _by_length(written: list[str]) -> list[int]:
    """The rank of each stage's length; equal lengths share one."""
    lengths = [len(stage) for stage in written]
    return [sorted(set(lengths)).index(length) for length in lengths]


def _experts(recipe: Recipe, nproc: int) -> dict[str, int | None]:
    model = recipe.model
    if model.num_experts is None:
        return {}
    own, shared = model.moe_ffn_hidden_size, model.moe_shared_expert_intermediate_size
    return {
        # A token is computed by half of them at most.
        "num_experts": _smaller(model.num_experts, nproc, at_least=max(4, 2 * model.moe_router_topk)),
        "moe_ffn_hidden_size": own and _smaller(own, 2 * nproc, at_least=32),
        "moe_shared_expert_intermediate_size": shared and _smaller(shared, 2 * nproc, at_least=32),
    }


def _state_space(recipe: Recipe, nproc: int) -> Changes:
    mixer = recipe.state_space
    if mixer is None:
        return {}
    groups = _smaller(mixer.num_groups, nproc, at_least=4)
    seq_length, short = recipe.training.seq_length, _seq_length(recipe, nproc)
    base = mixer.length_scaling_base
    return {
        "state_size": _smaller(mixer.state_size, 2, at_least=16),
        "state_head_dim": _smaller(mixer.head_dim, 1, at_least=8),
        "state_num_groups": groups,
        "state_num_heads": groups * min(mixer.num_heads // mixer.num_groups, 4),
        "chunk_size": _chunk_size(mixer.chunk_size, seq_length, short, nproc),
        "length_scaling_base": base and max(2, round(base * short / seq_length)),
    }


def _seq_length(recipe: Recipe, nproc: int) -> int:
    # Context parallelism divides a sequence into two pieces per process.
    return _smaller(recipe.training.seq_length, 2 * nproc, at_least=40)


def _chunk_size(chunk: int, seq_length: int, short: int, nproc: int) -> int:
    """A chunk size that divides the short sequence if the recipe's divides its own, and only then."""
    if short == seq_length:
        return chunk
    if seq_length % chunk == 0:
        return short // math.gcd(seq_length // chunk, 2 * nproc)
    if chunk > seq_length:
        return short + 8
    return next(size for size in itertools.count(short // 3) if short % size != 0)


def _training(recipe: Recipe, nproc: int, steps: int) -> Changes:
    seq_length = _seq_length(recipe, nproc)
    micro_batch_size = min(recipe.training.micro_batch_size, 2)
    samples, each = recipe.global_batch_size, micro_batch_size * nproc
    if samples > 16 or samples % each != 0:
        samples = each
    return {
        "training.seq_length": seq_length,
        "training.micro_batch_size": micro_batch_size,
        "training.global_batch_tokens": samples * seq_length,
        "training.train_tokens": None,
        "training.train_iters": steps,
        "training.precision": "fp32",
        "training.transformer_impl": "local",
        **WITHOUT_FP8,
        # The first steps must move the weights.
        "optimizer.warmup_fraction": 0.0,
        "optimizer.decay_style": "constant",
        "optimizer.wsd_decay_fraction": None,
        # Otherwise Adam's first step moves weights whose gradient is pure rounding by a full learning rate.
        "optimizer.adam_eps": max(recipe.optimizer.adam_eps, 1e-3),
        **({"optimizer.muon_fp32_matmul_prec": "high"} if recipe.optimizer.name == "muon" else {}),
    }


def _without_surroundings(recipe: Recipe, tokens: Path) -> Changes:
    """No corpus, tokenizer, checkpoints or reports."""
    return {
        **WITHOUT_TOKENS,
        **WITHOUT_TOKENIZER,
        **WITHOUT_REPORTS,
        "data.blend": ((1.0, str(tokens)),),
        "data.split": "100,0,0",
        "data.cache_path": None,
        "data.vocab_size": VOCAB_SIZE,
        "data.make_vocab_size_divisible_by": _smaller(recipe.data.make_vocab_size_divisible_by, 8, at_least=8),
        "checkpoint.directory": None,
        "checkpoint.save_interval": None,
        "checkpoint.load_from": None,
        "checkpoint.branch_from": None,
        "logging.log_interval": 1,
        "logging.eval_interval": None,
        "logging.eval_iters": 0,
        **{f"megatron.{key}": None for key in left_out(recipe)},
    }
