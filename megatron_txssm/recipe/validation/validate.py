"""Checks between a recipe's fields. Each error gives name, value and remedy."""

import re
from pathlib import Path

from megatron_txssm.architecture.layer_pattern import check_pattern
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import FIELDS
from megatron_txssm.recipe.sizes import check_divisible
from megatron_txssm.recipe.validation.data_checks import check_data
from megatron_txssm.recipe.validation.evaluation_checks import check_evaluation
from megatron_txssm.recipe.validation.expert_checks import check_experts
from megatron_txssm.recipe.validation.fp8_checks import check_fp8
from megatron_txssm.recipe.validation.guard_checks import check_guard, check_skip_steps
from megatron_txssm.recipe.validation.layout_checks import (
    check_pipeline_and_context_parallel,
    check_tensor_parallel,
    check_world_size,
    recipe_names,
)
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


def _check_name(recipe: Recipe) -> None:
    # The name becomes a folder.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", recipe.name):
        raise UserError(f"name={recipe.name!r} must be letters, digits, '.', '_', '+' and '-', as it names a folder")


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    check_pattern(model.layer_pattern)
    if recipe.has_state_space and model.state_num_heads is None:
        check_divisible(
            "hidden_size", model.hidden_size, "state_head_dim", model.state_head_dim, "state state_num_heads as well"
        )
    with recipe_names():
        _ = recipe.state_space
    if model.kv_channels is None:
        check_divisible("hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads)
    if model.num_query_groups is not None:
        check_divisible("num_attention_heads", model.num_attention_heads, "num_query_groups", model.num_query_groups)


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
    check_divisible("hidden_size", recipe.model.hidden_size, "tensor_model_parallel_size", tensor)
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
    check_divisible(
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
        check_divisible(
            "checkpoint.keep_every", checkpoint.keep_every, "save_interval", interval, f"use a multiple of {interval}"
        )


def _check_sources(recipe: Recipe) -> None:
    checkpoint = recipe.checkpoint
    if checkpoint.load_from is not None and checkpoint.branch_from is not None:
        raise UserError(
            f"checkpoint.load_from={checkpoint.load_from} and branch_from={checkpoint.branch_from} exclude each other; "
            "state one"
        )


_CHECKS = (
    _check_name,
    _check_model,
    _check_ablation,
    _check_rotation,
    check_tensor_parallel,
    check_experts,
    _check_prediction,
    check_pipeline_and_context_parallel,
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
    check_data,
)
