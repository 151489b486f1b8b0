"""Checks between a recipe's fields. Each error gives name, value and remedy."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_txssm.architecture.layer_pattern import check_pattern, in_stages, stages
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIELDS
from megatron_txssm.recipe.sizes import data_parallel_size, divisors
from megatron_txssm.recipe.validation.evaluation_checks import check_evaluation
from megatron_txssm.recipe.validation.expert_checks import check_expert_parallel, check_experts
from megatron_txssm.recipe.validation.fp8_checks import check_fp8
from megatron_txssm.recipe.validation.guard_checks import check_guard, check_skip_steps
from megatron_txssm.recipe.validation.muon_checks import check_muon
from megatron_txssm.recipe.validation.mup_checks import check_mup


def validate(recipe: Recipe, world_size: int | None = None, *, source: Path | None = None) -> None:
    """UserError for the first contradiction; with `world_size` (processes), batch and layout are checked against it.

    source: the recipe's file, which the message then names.
    """
    try:
        for check in _CHECKS:
            check(recipe)
        if world_size is not None:
            check_world_size(recipe, world_size)
    except UserError as error:
        if source is None:
            raise
        raise UserError(f"{source}: {error}") from None


def check_tokenizer_file(recipe: Recipe) -> None:
    """UserError if the tokenizer is a file that does not exist."""
    model = recipe.tokenizer_model
    if model and recipe.tokenizer_type == "SentencePieceTokenizer" and not Path(model).is_file():
        raise UserError(f"data.tokenizer_model={model}: no such file (a relative path starts at {Path.cwd()})")


def _check_divisible(name: str, value: int, by_name: str, by: int, remedy: str | None = None) -> None:
    if value % by != 0:
        legal = remedy or f"use one of {', '.join(map(str, divisors(value)))}"
        raise UserError(f"{name}={value} is not divisible by {by_name}={by}; {legal}")


def _check_name(recipe: Recipe) -> None:
    # The name becomes a folder.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", recipe.name):
        raise UserError(f"name={recipe.name!r} must be letters, digits, '.', '_', '+' and '-', as it names a folder")


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    check_pattern(model.layer_pattern)
    if recipe.has_state_space and model.state_num_heads is None:
        _check_divisible(
            "hidden_size", model.hidden_size, "state_head_dim", model.state_head_dim, "state state_num_heads as well"
        )
    with _recipe_names():
        _ = recipe.state_space
    if model.kv_channels is None:
        _check_divisible("hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads)
    if model.num_query_groups is not None:
        _check_divisible("num_attention_heads", model.num_attention_heads, "num_query_groups", model.num_query_groups)


@contextmanager
def _recipe_names() -> Iterator[None]:
    """Translate the mixer's field names in error messages to the recipe's."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"^(num_groups|num_heads|head_dim)=", r"state_\1=", str(error))) from None


def _check_ablation(recipe: Recipe) -> None:
    model = recipe.model
    if model.ablation is None:
        return
    if recipe.has_experts or recipe.prediction_depths:
        raise UserError(
            f"ablation={model.ablation} is for layers M, * and -, but layer_pattern={model.layer_pattern} has experts "
            "or prediction depths; leave them out, or set ablation: null"
        )
    if model.ablation == "no_norm" and recipe.training.transformer_impl != "local":
        raise UserError(
            "ablation=no_norm is not possible with Transformer Engine, whose norms are parts of linear layers; set "
            "training.transformer_impl: local"
        )


def _check_rotation(recipe: Recipe) -> None:
    model = recipe.model
    if recipe.has_attention and model.attention_position_encoding == "rope" and recipe.kv_channels % 2 != 0:
        raise UserError(
            f"attention heads have {recipe.kv_channels} channels, an odd number, but rotation needs pairs; "
            f"set kv_channels={recipe.kv_channels + 1}, or attention_position_encoding: none"
        )
    if model.rope_scaling == "linear" and model.rotary_interpolation_factor is None:
        raise UserError("rope_scaling='linear' needs rotary_interpolation_factor, the divisor of positions")
    if model.rope_scaling == "none" and model.rotary_interpolation_factor is not None:
        raise UserError(
            f"rotary_interpolation_factor={model.rotary_interpolation_factor} has no effect with rope_scaling='none'; "
            "set rope_scaling: linear"
        )


def _check_tensor_parallel(recipe: Recipe) -> None:
    model, size = recipe.model, recipe.parallel.tensor_model_parallel_size
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(model, name)
        if value is not None:
            _check_divisible(name, value, "tensor_model_parallel_size", size, _short_list(value))
    if model.ffn_hidden_size // size % 2 != 0:
        raise UserError(
            f"ffn_hidden_size={model.ffn_hidden_size} leaves {model.ffn_hidden_size // size} channels to each "
            f"tensor-parallel process, an odd number, which Megatron's SwiGLU warm-up cannot halve; "
            f"use {model.ffn_hidden_size + size}"
        )
    if recipe.state_space is not None:
        with _recipe_names():
            recipe.state_space.check_tensor_parallel(size)
    multiple = recipe.data.make_vocab_size_divisible_by
    _check_divisible(
        "make_vocab_size_divisible_by", multiple, "tensor_model_parallel_size", size, f"use a multiple of {size}"
    )
    if recipe.parallel.sequence_parallel:
        _check_divisible(
            "seq_length / context_parallel_size",
            recipe.training.seq_length // recipe.parallel.context_parallel_size,
            "tensor_model_parallel_size",
            size,
            "or set sequence_parallel: false",
        )


def _short_list(value: int) -> str:
    return f"use one of {', '.join(str(d) for d in divisors(value) if d <= 64)}"


def _check_stages(recipe: Recipe) -> None:
    pipeline, virtual = recipe.parallel.pipeline_model_parallel_size, recipe.parallel.virtual_pipeline_stages or 1
    if virtual > 1 and pipeline == 1:
        raise UserError(f"virtual_pipeline_stages={virtual} needs pipeline_model_parallel_size above 1; leave it out")
    if in_stages(recipe.model.layer_pattern, recipe.pipeline_stages) is not None:
        return
    asked = f"pipeline_model_parallel_size={pipeline}" + (
        f" x virtual_pipeline_stages={virtual}" if virtual > 1 else ""
    )
    written, count = len(stages(recipe.model.layer_pattern)), len(recipe.layers)
    if written > 1:
        raise UserError(
            f"{asked} needs {recipe.pipeline_stages} stages, and layer_pattern is divided by | into {written}; "
            "change one of them, or write the pattern without | to divide it evenly"
        )
    raise UserError(
        f"the {count} layers of layer_pattern are not divisible by {asked}; use "
        f"{', '.join(str(size) for size in divisors(count) if size <= 64)} stages, or divide the pattern by |"
    )


def _check_prediction(recipe: Recipe) -> None:
    """Rejects what multi-token prediction would compute differently at another layout, or does not support."""
    if not recipe.prediction_depths:
        weight, default = recipe.model.mtp_loss_scaling_factor, FIELDS["model"]["mtp_loss_scaling_factor"].default
        if weight != default:
            raise UserError(
                f"mtp_loss_scaling_factor={weight:g} has no effect, as layer_pattern has no prediction depths; write "
                f"/*- at its end for one, or leave mtp_loss_scaling_factor out (default: {default})"
            )
        return
    tensor = recipe.parallel.tensor_model_parallel_size
    # The rows of each depth's projection.
    _check_divisible("hidden_size", recipe.model.hidden_size, "tensor_model_parallel_size", tensor)
    if recipe.training.fp8 is not None:
        raise UserError(
            f"training.fp8={recipe.training.fp8} is not supported with prediction depths (/ in layer_pattern) yet; "
            "leave one of them out"
        )
    if recipe.training.mask_end_of_document and recipe.parallel.context_parallel_size > 1:
        raise UserError(
            "training.mask_end_of_document=true weights the losses of prediction depths (/ in layer_pattern) by the "
            "tokens of each context-parallel process; set context_parallel_size: 1, or leave one of them out"
        )


def _check_other_parallel(recipe: Recipe) -> None:
    parallel = recipe.parallel
    _check_stages(recipe)
    context, length = parallel.context_parallel_size, recipe.training.seq_length
    if context > 1 and length % (2 * context) != 0:
        raise UserError(
            f"seq_length={length} is not divisible by 2 x context_parallel_size={context}, the pieces of a sequence; "
            f"use a multiple of {2 * context}"
        )
    if recipe.state_space is not None:
        with _recipe_names():
            recipe.state_space.check_context_parallel(context, parallel.tensor_model_parallel_size)
        piece, looks_back = length // (2 * context), recipe.state_space.conv_kernel - 1
        if context > 1 and recipe.state_space.conv_sizes and piece < looks_back:
            raise UserError(
                f"context_parallel_size={context} leaves pieces of {piece} tokens, fewer than the {looks_back} that "
                "the convolution reaches back; use a longer seq_length"
            )


def _check_gpu_options(recipe: Recipe) -> None:
    """Rejects what would fail or go wrong in Megatron only after it has started on GPUs."""
    megatron = recipe.megatron
    if megatron.get("optimizer_cpu_offload") and recipe.state_space is not None:
        raise UserError(
            "megatron.optimizer_cpu_offload=True does not work with state-space layers: Megatron 0.19.2 cannot offload "
            "parameters that are themselves fp32, such as A_log; set it to null"
        )
    if megatron.get("cuda_graph_impl") == "full_iteration":
        if megatron.get("check_for_nan_in_loss_and_grad", True):
            raise UserError(
                "megatron.cuda_graph_impl=full_iteration prevents checks of losses within a step; also set "
                "megatron.check_for_nan_in_loss_and_grad=false (weights are still checked before each save)"
            )
        if (warm_up := megatron.get("cuda_graph_warmup_steps", 1)) is not None and warm_up < 1:
            raise UserError(
                f"megatron.cuda_graph_warmup_steps={warm_up} must be at least 1: the first step's compilation and "
                "allocations must not be recorded"
            )
        if recipe.data.isolate_documents:
            raise UserError(
                "megatron.cuda_graph_impl=full_iteration repeats the shapes of one step, but with "
                "data.isolate_documents=true they change with each step; set one of the two to null"
            )


def _check_length(recipe: Recipe) -> None:
    training = recipe.training
    if training.global_batch_tokens % training.seq_length != 0:
        near = max(1, round(training.global_batch_tokens / training.seq_length)) * training.seq_length
        raise UserError(
            f"global_batch_tokens={training.global_batch_tokens} is not a multiple of "
            f"seq_length={training.seq_length}; the nearest is {near}"
        )
    if (training.train_tokens is None) == (training.train_iters is None):
        stated = "neither" if training.train_tokens is None else "both"
        raise UserError(f"state either training.train_tokens or training.train_iters, not {stated}")
    _check_divisible(
        "the global batch in samples", recipe.global_batch_size, "micro_batch_size", training.micro_batch_size
    )


def _check_schedule(recipe: Recipe) -> None:
    optimizer, share = recipe.optimizer, recipe.optimizer.wsd_decay_fraction
    if optimizer.decay_style == "WSD" and share is None:
        raise UserError(
            "optimizer.decay_style=WSD needs optimizer.wsd_decay_fraction, the final fraction of the steps, such as "
            "0.1, in which the learning rate falls"
        )
    if optimizer.decay_style != "WSD" and share is not None:
        raise UserError(
            f"optimizer.wsd_decay_fraction={share:g} has no effect with decay_style={optimizer.decay_style}; "
            "set optimizer.decay_style=WSD, or leave it out"
        )
    end = recipe.megatron.get("lr_decay_iters")
    if share is not None and end is not None:
        raise UserError(
            f"megatron.lr_decay_iters={end} contradicts decay_style=WSD, which decays until the last step; leave it out"
        )
    if share is not None and share + optimizer.warmup_fraction > 1:
        raise UserError(
            f"optimizer.warmup_fraction={optimizer.warmup_fraction:g} and wsd_decay_fraction={share:g} add up to more "
            "than all steps; make one smaller"
        )


def _check_retention(recipe: Recipe) -> None:
    checkpoint = recipe.checkpoint
    if checkpoint.keep_every is None:
        return
    if checkpoint.keep_last is None:
        raise UserError(
            f"checkpoint.keep_every={checkpoint.keep_every} has no effect without keep_last, and all checkpoints are "
            "kept; set checkpoint.keep_last, such as 2, or leave it out"
        )
    if checkpoint.save_interval is not None:
        interval = checkpoint.save_interval
        _check_divisible(
            "checkpoint.keep_every", checkpoint.keep_every, "save_interval", interval, f"use a multiple of {interval}"
        )


def _check_sources(recipe: Recipe) -> None:
    checkpoint = recipe.checkpoint
    if checkpoint.load_from is not None and checkpoint.branch_from is not None:
        raise UserError(
            f"checkpoint.load_from={checkpoint.load_from} and branch_from={checkpoint.branch_from} exclude each other; "
            "state one"
        )


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    mock = recipe.megatron.get("mock_data")
    sources = ["megatron.mock_data"] if mock else []
    sources += [f"data.{name}" for name in ("corpus", "train", "blend", "recall_pairs") if getattr(data, name)]
    if len(sources) > 1:
        raise UserError(f"{' and '.join(sources)} exclude each other; state one")
    if not sources:
        raise UserError(
            "data.corpus is missing: a directory made by `txssm data shard`; or state data.train, your own token "
            "files, or set megatron.mock_data=true to train on made-up tokens"
        )
    _check_blend(recipe)
    if mock and recipe.logging.eval_iters is None:
        raise UserError(
            "logging.eval_iters=null validates on all data, and megatron.mock_data has 200 million tokens; "
            "set logging.eval_iters to a number of batches, such as 10"
        )
    if data.recall_pairs:
        _check_recall(recipe, data.recall_pairs)
    if mock:
        _check_tokenizer(recipe)
        return
    if data.validation and not data.train:
        raise UserError(
            "data.validation needs data.train; a corpus has its own, and data.blend is divided by data.split"
        )
    if data.blend and data.split is None:
        raise UserError("data.blend needs data.split, such as '99,1,0': shares of train, validation and test")
    if data.split is not None and not data.blend:
        raise UserError(
            f"data.split={data.split!r} needs data.blend; a corpus, data.train and data.validation are used whole"
        )
    tested = any(share.strip(" 0.") for share in (data.split or "").split(",")[2:])
    # `txssm eval loss` sets skip_train and does not read the test set.
    if tested and recipe.logging.eval_iters is None and not recipe.megatron.get("skip_train"):
        raise UserError(
            f"data.split={data.split!r} has a test set, which Megatron cannot read in full after training; "
            "set its share, the third, to 0, or logging.eval_iters to a number of batches"
        )
    if data.train and not data.validation and recipe.logging.eval_iters != 0:
        raise UserError("data.validation is missing; state it, or set logging.eval_iters=0")
    _check_tokenizer(recipe)


def _check_recall(recipe: Recipe, counts: Sequence[int]) -> None:
    if len(set(counts)) < len(counts):
        raise UserError(f"data.recall_pairs={[*counts]} has a number of pairs twice; state each once")
    pairs = max(counts)
    stated = f"data.recall_pairs with {pairs} pairs"
    # Two tokens for each pair, and two for each query; keys are one half of the vocabulary, without token 0.
    for field, value, needed in (
        ("training.seq_length", recipe.training.seq_length, 4 * pairs),
        ("data.vocab_size", recipe.data.vocab_size, 2 * (pairs + 1)),
    ):
        if value < needed:
            raise UserError(f"{stated} needs {field} of at least {needed}, not {value}; raise it, or state fewer pairs")
    if recipe.logging.eval_iters not in (None, 0):
        raise UserError(
            f"logging.eval_iters={recipe.logging.eval_iters}: the held-out samples of data.recall_pairs are read "
            "whole, so that every number of pairs is; set logging.eval_iters=null"
        )
    if recipe.prediction_depths:
        raise UserError(
            f"model.layer_pattern={recipe.model.layer_pattern} predicts further tokens, but in samples of "
            "data.recall_pairs an answer is not followed by another; leave out what follows the /"
        )


def _check_tokenizer(recipe: Recipe) -> None:
    data = recipe.data
    if data.corpus is None and recipe.tokenizer_type != "NullTokenizer" and not data.tokenizer_model:
        raise UserError(f"data.tokenizer_model is missing for tokenizer_type={recipe.tokenizer_type}")


def _check_blend(recipe: Recipe) -> None:
    """Checks of the subsets' mixture that do not need the corpus."""
    data, iters = recipe.data, recipe.stage_iters
    if data.weights and data.stages:
        raise UserError("data.weights and data.stages exclude each other; each stage has its own weights")
    for name in ("weights", "stages"):
        if getattr(data, name) and data.corpus is None:
            raise UserError(f"data.{name} needs data.corpus, whose subsets it names; leave it out")
    if iters[-1] < 1:
        raise UserError(
            f"data.stages: {sum(iters[:-1])} steps before the last stage leave none of the {recipe.train_iters} to it; "
            "shorten the stages or train longer (to run only the beginning, set megatron.exit_interval)"
        )


def check_world_size(recipe: Recipe, world_size: int) -> None:
    """UserError if so many processes do not divide into the recipe's layout and batch."""
    copies = data_parallel_size(recipe, world_size)
    check_expert_parallel(recipe, copies)
    micro, batch = recipe.training.micro_batch_size, recipe.global_batch_size
    if batch % (micro * copies) != 0:
        sizes = ", ".join(map(str, divisors(batch // copies)))
        fitting = f"use micro_batch_size of one of {sizes}" if batch % copies == 0 else "change global_batch_tokens"
        raise UserError(
            f"the global batch of {batch} samples (global_batch_tokens / seq_length) is not divisible by "
            f"micro_batch_size={micro} x {copies} data-parallel processes; with {copies} of them {fitting}"
        )
    pipeline = recipe.parallel.pipeline_model_parallel_size
    microbatches = batch // (micro * copies)
    if (recipe.parallel.virtual_pipeline_stages or 1) > 1 and microbatches % pipeline != 0:
        raise UserError(
            f"the interleaved schedule needs a multiple of pipeline_model_parallel_size={pipeline} "
            f"micro-batches a step, not {microbatches}; change micro_batch_size or global_batch_tokens"
        )


_CHECKS = (
    _check_name,
    _check_model,
    _check_ablation,
    _check_rotation,
    _check_tensor_parallel,
    check_experts,
    _check_prediction,
    _check_other_parallel,
    _check_length,
    check_fp8,
    check_muon,
    check_mup,
    _check_gpu_options,
    _check_schedule,
    check_skip_steps,
    check_guard,
    check_evaluation,
    _check_retention,
    _check_sources,
    _check_data,
)
