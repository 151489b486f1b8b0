"""Repairs of what Megatron's optimizers save and load. `compat.mend_megatron` applies them.

Checked against megatron-core 0.19.2 (tests/test_compat.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

# A parameter group of a torch optimizer.
type ParameterGroup = dict[str, Any]


def mend_optimizers() -> None:
    """Patch Megatron's optimizers; once per process."""
    _load_optimizer_state_without_grad()
    _find_distributed_optimizer_state()
    _find_mixed_precision_optimizer_state()
    _save_parameters_of_padded_buckets()
    _load_optimizers_without_parameters()
    _count_steps_of_optimizers_without_parameters()


def _load_optimizer_state_without_grad() -> None:
    """With fp32 parameters, the distributed optimizer copies into views of leaf tensors, which autograd forbids."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load: Any = DistributedOptimizer.load_state_dict
    DistributedOptimizer.load_state_dict = functools.wraps(load)(torch.no_grad()(load))


def _find_distributed_optimizer_state() -> None:
    """The distributed optimizer finds the state of a bf16 model's fp32 parameters (A_log) at other parameters.

    It orders a parameter group by gradient buffer, one per dtype, and records each parameter's place; but it passes the
    group to Adam with the fp32 parameters first. Here they come first from the start.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer: Any = DistributedOptimizer
    build = optimizer._build_optimizer_group_ranges.__func__

    @functools.wraps(build)
    def build_fp32_first(
        cls: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[torch.nn.Parameter, tuple[int, int]], list[ParameterGroup]]:
        _, groups = build(cls, *args, **kwargs)
        for group in groups:
            # Stable: groups of one dtype keep their order.
            group["params"].sort(key=lambda param: param.dtype != torch.float32)
        places = {param: (i, j) for i, group in enumerate(groups) for j, param in enumerate(group["params"])}
        return places, groups

    optimizer._build_optimizer_group_ranges = classmethod(build_fp32_first)


def _find_mixed_precision_optimizer_state() -> None:
    """Without the distributed optimizer, state is matched only to the 16-bit parameters.

    During saving and loading, this adds the fp32 parameters to the lists of 16-bit parameters and of their fp32 copies,
    each as its own copy, in Adam's order; the distributed optimizer saves them in the same way.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    optimizer: Any = Float16OptimizerWithFloat16Params
    for name in ("sharded_state_dict", "load_state_dict"):
        setattr(optimizer, name, _with_fp32_parameters(getattr(optimizer, name)))


def _with_fp32_parameters(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_stub_optimizer:  # without parameters
            return method(self, *args, **kwargs)
        params_16_bit, copies = self.float16_groups, self.fp32_from_float16_groups
        param_of = {
            id(copy): param
            for of_group in zip(params_16_bit, copies, strict=True)
            for param, copy in zip(*of_group, strict=True)
        }
        all_copies = [list(group["params"]) for group in self.optimizer.param_groups]
        self.float16_groups = [[param_of.get(id(copy), copy) for copy in group] for group in all_copies]
        self.fp32_from_float16_groups = all_copies
        try:
            return method(self, *args, **kwargs)
        finally:
            self.float16_groups, self.fp32_from_float16_groups = params_16_bit, copies

    return wrapped


def _save_parameters_of_padded_buckets() -> None:
    """The distributed optimizer saves shifted state if a gradient buffer has several buckets with padding in between.

    It removes the padding, but then indexes parameters as if it were there, and only logs a warning. There are several
    buckets under --overlap-grad-reduce, and if pipeline stages share the embedding.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer: Any = DistributedOptimizer
    build = optimizer.sharded_param_state_fully_reshardable

    @functools.wraps(build)
    def build_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [(buffer, buffer.numel) for buffer in self.buffers]
        padded += [(bucket, bucket.grad_data.numel()) for buffer in self.buffers for bucket in buffer.buckets]
        unpadded = [holder.numel_unpadded for holder, _ in padded]
        try:
            for holder, numel in padded:
                holder.numel_unpadded = numel
            return build(self, *args, **kwargs)
        finally:
            for (holder, _), numel in zip(padded, unpadded, strict=True):
                holder.numel_unpadded = numel

    optimizer.sharded_param_state_fully_reshardable = build_with_padding


def _load_optimizers_without_parameters() -> None:
    """A pipeline stage without experts has an optimizer for them, without a parameter.

    A checkpoint lacks its empty state, which loading expects. If that is the first stage, the mixed-precision
    optimizer's empty list of fp32 copies is saved in place of the other stages', and cannot be loaded there.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    for optimizer in (Float16OptimizerWithFloat16Params, FP32Optimizer):
        setattr(optimizer, "load_state_dict", _with_empty_state(optimizer.load_state_dict))
    mixed_precision: Any = Float16OptimizerWithFloat16Params
    mixed_precision.sharded_state_dict = _without_empty_copies(mixed_precision.sharded_state_dict)


def _with_empty_state(load: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load)
    def wrapped(self: Any, state_dict: dict[str, Any]) -> None:
        state_dict.get("optimizer", state_dict).setdefault("state", {})
        if "optimizer" in state_dict:
            state_dict.setdefault("fp32_from_fp16_params", [])
        load(self, state_dict)

    return wrapped


def _without_empty_copies(save: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(save)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state_dict = save(self, *args, **kwargs)
        if not any(state_dict["fp32_from_fp16_params"]):
            del state_dict["fp32_from_fp16_params"]
        return state_dict

    return wrapped


def _count_steps_of_optimizers_without_parameters() -> None:
    """On a stage without experts, Transformer Engine's Adam does not count the steps of their optimizer.

    If that is the first stage, whose counts are saved, the others' experts would resume with the bias corrections of
    step 1. Megatron aligns the counts before a save and after a load, but only those of groups with parameters.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    optimizer: Any = ChainedOptimizer
    synchronize = optimizer._synchronize_steps

    @functools.wraps(synchronize)
    def synchronize_all(self: Any) -> int | None:
        step = synchronize(self)
        if step is not None:
            for each in self.chained_optimizers:
                for group in each.optimizer.param_groups:
                    # Muon counts no steps.
                    if "momentum" not in group:
                        group["step"] = step
        return step

    optimizer._synchronize_steps = synchronize_all
