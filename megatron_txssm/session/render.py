"""Fields of a recipe whose Megatron arguments are not just their value under their own flag."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_txssm.architecture.layer_pattern import in_stages
from megatron_txssm.data.corpus.blend import corpus_arguments
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIELDS
from megatron_txssm.recipe.settings.setting import argument

_RECOMPUTE = {
    "none": [],
    "selective": ["--recompute-granularity", "selective"],
    "full": ["--recompute-granularity", "full", "--recompute-method", "uniform"],
}


def _layer_pattern(pattern: str, recipe: Recipe) -> list[str]:
    return argument("--hybrid-layer-pattern", in_stages(pattern, recipe.pipeline_stages))


def _query_groups(value: int | None, recipe: Recipe) -> list[str]:
    return [] if value is None else ["--group-query-attention", "--num-query-groups", str(value)]


def _experts(count: int | None, recipe: Recipe) -> list[str]:
    if not recipe.has_experts:
        return []
    # No expert drops a token, so the output for one depends neither on the layout nor on the other tokens.
    return [
        *argument("--num-experts", count),
        *argument("--moe-router-load-balancing-type", "aux_loss"),
        *argument("--moe-token-dispatcher-type", "alltoall"),
        *argument("--moe-router-dtype", "fp32"),
    ]


def _of_experts(flag: str) -> Callable[[Any, Recipe], list[str]]:
    """A flag that Megatron accepts only with experts, or ignores without them."""
    return lambda value, recipe: argument(flag, value if recipe.has_experts else None)


def _of_muon(flag: str) -> Callable[[Any, Recipe], list[str]]:
    """A flag that Megatron ignores with another optimizer."""
    return lambda value, recipe: argument(flag, value if recipe.optimizer.name == "muon" else None)


def _mup(base: int | None, recipe: Recipe) -> list[str]:
    # The power of 1/√d: a wider model has more attention heads, not wider ones.
    return [] if base is None else ["--use-mup", "--mup-base-hidden-size", str(base), "--mup-attn-scale-power", "0.5"]


def _sequence_parallel(on: bool, recipe: Recipe) -> list[str]:
    return argument("--sequence-parallel", on and recipe.parallel.tensor_model_parallel_size > 1)


def _bf16_ends(layers: int, recipe: Recipe) -> list[str]:
    if layers == 0:
        return []
    counts = ["--num-layers-at-start-in-bf16", str(layers), "--num-layers-at-end-in-bf16", str(layers)]
    return ["--first-last-layers-bf16", *counts]


def _recompute(kind: str, recipe: Recipe) -> list[str]:
    if kind != "full":
        return _RECOMPUTE[kind]
    # A mixer and its FFN together: the input of every second layer is kept. Prediction depths need every layer's.
    return [*_RECOMPUTE[kind], "--recompute-num-layers", "1" if recipe.prediction_depths else "2"]


def _wsd_shape(shape: str, recipe: Recipe) -> list[str]:
    return argument("--lr-wsd-decay-style", shape if recipe.wsd_decay_iters else None)


def _vocabulary(size: int, recipe: Recipe) -> list[str]:
    return ["--vocab-size", str(size), "--padded-vocab-size", str(recipe.padded_vocab_size)]


def _checkpoints(_: str | None, recipe: Recipe) -> list[str]:
    if recipe.checkpoint.save_interval is None:
        return []
    path = str(recipe.checkpoint_path)
    return [*argument("--save", path), *argument("--load", path)]


def _validation_batches(count: int | None, recipe: Recipe) -> list[str]:
    # Together, because Megatron 0.19.2 fails on a full validation of a single set.
    return ["--full-validation", "--multiple-validation-sets"] if count is None else ["--eval-iters", str(count)]


def _tensorboard(on: bool, recipe: Recipe) -> list[str]:
    return argument("--tensorboard-dir", str(recipe.run_path / "tensorboard") if on else None)


def _recall(pairs: tuple[int, ...] | None, recipe: Recipe) -> list[str]:
    if pairs is None:
        return []
    words = ["--recall-pairs", *map(str, pairs)]
    if recipe.logging.eval_iters is None:
        words += ["--validation-set-names", *(f"{each}_pairs" for each in pairs)]
    # Every answer has equal weight, however many of them a micro-batch has.
    return [*words, "--calculate-per-token-loss"]


# Field -> function of (value, recipe) that returns words of Megatron's command line.
RENDERS: Mapping[str, Callable[[Any, Recipe], list[str]]] = {
    "model.layer_pattern": _layer_pattern,
    "model.num_experts": _experts,
    "model.moe_router_topk": _of_experts("--moe-router-topk"),
    "model.moe_ffn_hidden_size": lambda size, recipe: argument(
        "--moe-ffn-hidden-size", recipe.experts.ffn_hidden_size if recipe.experts else None
    ),
    "model.moe_shared_expert_intermediate_size": _of_experts("--moe-shared-expert-intermediate-size"),
    "model.moe_aux_loss_coeff": _of_experts("--moe-aux-loss-coeff"),
    "model.num_query_groups": _query_groups,
    "model.state_dt_bias": lambda biased, _: argument("--state-space-no-dt-bias", not biased),
    "model.tie_embeddings": lambda tied, _: argument("--untie-embeddings-and-output-weights", not tied),
    "model.mup_base_hidden_size": _mup,
    # Included in the pattern.
    "parallel.virtual_pipeline_stages": lambda stages, _: [],
    "parallel.sequence_parallel": _sequence_parallel,
    "parallel.recompute": _recompute,
    "training.global_batch_tokens": lambda _, recipe: argument("--global-batch-size", recipe.global_batch_size),
    "training.train_tokens": lambda tokens, recipe: argument("--train-iters", tokens and recipe.train_iters),
    "training.precision": lambda precision, _: argument("--bf16", precision == "bf16"),
    "training.fp8_recipe": lambda kind, recipe: argument("--fp8-recipe", kind if recipe.training.fp8 else None),
    "training.first_last_layers_bf16": _bf16_ends,
    "optimizer.min_learning_rate_ratio": lambda ratio, recipe: argument(
        "--min-lr", f"{ratio * recipe.optimizer.learning_rate:.12g}"
    ),
    **{
        f"optimizer.{name}": _of_muon(*field.setting.flags)
        for name, field in FIELDS["optimizer"].items()
        if name.startswith("muon_")
    },
    "optimizer.wsd_decay_fraction": lambda _, recipe: argument("--lr-wsd-decay-iters", recipe.wsd_decay_iters),
    "optimizer.wsd_decay_shape": _wsd_shape,
    "optimizer.schedule_at_resume": lambda holds, _: argument("--override-opt-param-scheduler", holds == "recipe"),
    "data.corpus": lambda corpus, recipe: [] if corpus is None else corpus_arguments(recipe),
    # Included in the corpus's arguments.
    "data.weights": lambda _, recipe: [],
    "data.stages": lambda _, recipe: [],
    "data.recall_pairs": _recall,
    "data.tokenizer_type": lambda _, recipe: argument("--tokenizer-type", recipe.tokenizer_type),
    "data.tokenizer_model": lambda _, recipe: argument("--tokenizer-model", recipe.tokenizer_model),
    "data.vocab_size": _vocabulary,
    "data.cache_path": lambda _, recipe: argument("--data-cache-path", recipe.cache_path),
    "checkpoint.directory": _checkpoints,
    "logging.eval_interval": lambda steps, recipe: argument("--eval-interval", steps or recipe.train_iters + 1),
    "logging.eval_iters": _validation_batches,
    "logging.tensorboard": _tensorboard,
}
