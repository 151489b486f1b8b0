"""Builds the model, optimizer and schedule of one rank as Megatron does, and trains steps on tokens without meaning."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_txssm.planning.dry_run.watch import GroupNames, Watch, in_blocks
from megatron_txssm.planning.usage import Usage


class Rank:
    """One rank's model, built under `watch` after `start_megatron`."""

    def __init__(self, args: Any, watch: Watch, *, fake: bool):
        from megatron.core.enums import ModelType
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.utils import get_model_config
        from megatron.training import training
        from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args

        from megatron_txssm.session.start import model_config

        self.args, self.watch = args, watch
        # The weights' values are drawn one by one.
        config = hybrid_config_from_args(args) if fake else model_config(args)
        self.models, optimizer, _ = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=pretrain_cfg_container_from_args(args, config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        assert optimizer is not None
        self.optimizer = optimizer
        self._prepare(get_model_config(self.models[0]))

    def _prepare(self, config: Any) -> None:
        """As Megatron's train() does."""
        from megatron.core.distributed import finalize_model_grads

        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        if self.args.overlap_grad_reduce:
            one = len(self.models) == 1
            config.no_sync_func = self.models[0].no_sync if one else [model.no_sync for model in self.models]
            if self.args.align_grad_reduce:
                starts = [model.start_grad_sync for model in self.models]
                config.grad_sync_func = starts[0] if one else starts
        if self.args.overlap_param_gather and self.args.align_param_gather:
            starts = [model.start_param_sync for model in self.models]
            config.param_sync_func = starts[0] if len(starts) == 1 else starts

    def step(self, micro_batches: int) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_txssm.training.forward_step import forward_step

        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = [_batches(self.args) for _ in self.models]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=self.models,
            num_microbatches=micro_batches,
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            decoder_seq_length=self.args.decoder_seq_length,
            forward_only=False,
        )
        self.optimizer.step()

    def usage(self, traffic: Mapping[tuple[str, str], int]) -> Usage:
        weights = _bytes(parameter for model in self.models for parameter in model.parameters())
        gradients = _bytes(buffer.grad_data for model in self.models for buffer in _buffers(model))
        optimizer = _bytes(_optimizer_tensors(self.optimizer), besides=self._storages())
        state = weights + gradients + optimizer
        return Usage(weights, gradients, optimizer, self.watch.peak - state, dict(traffic))

    def _storages(self) -> set[int]:
        held = [parameter for model in self.models for parameter in model.parameters()]
        held += [buffer.grad_data for model in self.models for buffer in _buffers(model)]
        return {tensor.untyped_storage()._cdata for tensor in held}


def used_by_steps(rank: Rank, micro_batches: int) -> Usage:
    """Usage of a step of `micro_batches`, from two short steps.

    Traffic grows evenly with the micro-batches; memory no longer grows once the pipeline is full. The optimizer makes
    its moments in the first step.
    """
    stages = rank.args.pipeline_model_parallel_size
    if rank.args.virtual_pipeline_model_parallel_size:
        # Interleaving takes multiples of the stages, and of two of them to fill the pipeline.
        first, second = stages, 2 * stages
    else:
        first, second = 1, stages + 1
    first, second = min(first, micro_batches), min(second, micro_batches)
    before, after = traffic_of_a_step(rank, first), traffic_of_a_step(rank, second)
    traffic: dict[tuple[str, str], int] = {}
    for key in before | after:
        # The first step may send more, once.
        each = max(0, after[key] - before[key]) // max(1, second - first)
        traffic[key] = after[key] + (micro_batches - second) * each
    return rank.usage(traffic)


def traffic_of_a_step(rank: Rank, micro_batches: int) -> Counter[tuple[str, str]]:
    rank.watch.forget_traffic()
    rank.step(micro_batches)
    return rank.watch.traffic


# Megatron's short names of process groups.
GROUPS = {
    "tp": "TENSOR_MODEL_PARALLEL_GROUP",
    "pp": "PIPELINE_MODEL_PARALLEL_GROUP",
    "cp": "CONTEXT_PARALLEL_GROUP",
    "dp": "DATA_PARALLEL_GROUP",
    "dp_cp": "DATA_PARALLEL_GROUP_WITH_CP",
    "ep": "EXPERT_MODEL_PARALLEL_GROUP",
    "expert_dp": "EXPERT_DATA_PARALLEL_GROUP",
    "embedding": "EMBEDDING_GROUP",
    "tp_ep": "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",
    "mp": "MODEL_PARALLEL_GROUP",
    "tp_cp": "TENSOR_AND_CONTEXT_PARALLEL_GROUP",
    "tp_dp_cp": "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP",
}


def group_names() -> GroupNames:
    from megatron.core import parallel_state

    found = {name: getattr(parallel_state, f"_{attribute}", None) for name, attribute in GROUPS.items()}
    return GroupNames({name: group for name, group in found.items() if isinstance(group, ProcessGroup)})


def _batches(args: Any) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of zeros."""
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        tokens = torch.zeros(shape, dtype=torch.long)
        positions = torch.arange(args.seq_length)
        if args.isolate_documents:
            positions = torch.tensor(document_positions(args.seq_length))
        yield {
            "tokens": tokens,
            "labels": tokens.clone(),
            "loss_mask": torch.ones(shape),
            "position_ids": positions.expand(shape),
        }


def document_positions(length: int) -> list[int]:
    """Each token's position in its document, of four in a sample."""
    return [position % -(-length // 4) for position in range(length)]


def _buffers(model: Any) -> list[Any]:
    return [*model.buffers, *model.expert_parallel_buffers]


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Master weights and moments of Megatron's optimizer, or of all that it chains."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(one, "optimizer", None)
        if inner is None:
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes(tensors: Iterator[Tensor], besides: set[int] = frozenset()) -> int:  # pyright: ignore[reportArgumentType]
    """Of all storages that hold `tensors`, but for those `besides`."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(in_blocks(size) for key, size in storages.items() if key not in besides)
