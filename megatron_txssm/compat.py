"""The only file that imports moved or private Megatron names, and that mends what its wheel lacks.

Checked against megatron-core 0.19.2 (tests/test_compat.py); at an upgrade, look here first.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.training
import torch
from megatron.core.ssm.utils import _split_tensor_factory as split_tensor_factory

__all__ = ["get_args", "mend_megatron", "split_tensor_factory"]

_mended = False


def get_args() -> argparse.Namespace:
    """Megatron's global arguments. Megatron's own function is untyped, and its variable begins as None."""
    return megatron.training.get_args()  # pyright: ignore[reportReturnType]


def mend_megatron() -> None:
    """Repair, once per process, five faults of Megatron 0.19.2 that hit every platform."""
    global _mended
    if _mended:
        return
    _mended = True
    _use_compiled_dataset_helpers()
    _load_optimizer_state_without_grad()
    _find_distributed_optimizer_state()
    _find_mixed_precision_optimizer_state()
    _save_parameters_of_padded_buckets()


def _use_compiled_dataset_helpers() -> None:
    """The wheel ships the compiled index builder without its Makefile; Megatron runs `make` all the same and exits."""
    import megatron.core.datasets.utils as utils

    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


def _load_optimizer_state_without_grad() -> None:
    """With fp32 parameters, the distributed optimizer copies into views of leaf tensors, which autograd forbids."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load: Any = DistributedOptimizer.load_state_dict
    DistributedOptimizer.load_state_dict = functools.wraps(load)(torch.no_grad()(load))


def _find_distributed_optimizer_state() -> None:
    """The distributed optimizer looks for the state of a bf16 model's fp32 parameters (A_log) at other parameters.

    It orders a parameter group by gradient buffer, of which every dtype has its own, and notes each parameter's place;
    then it hands the group to Adam with the fp32 parameters in front. Here they are in front from the start.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer: Any = DistributedOptimizer
    build = optimizer._build_optimizer_group_ranges.__func__

    @functools.wraps(build)
    def build_fp32_first(cls: Any, *args: Any, **kwargs: Any) -> tuple[dict[Any, tuple[int, int]], list[Any]]:
        _, groups = build(cls, *args, **kwargs)
        for group in groups:
            # Stable: groups of one dtype stay as they are.
            group["params"].sort(key=lambda param: param.dtype != torch.float32)
        places = {param: (i, j) for i, group in enumerate(groups) for j, param in enumerate(group["params"])}
        return places, groups

    optimizer._build_optimizer_group_ranges = classmethod(build_fp32_first)


def _find_mixed_precision_optimizer_state() -> None:
    """Without the distributed optimizer, state is matched to the 16-bit parameters only, as if there were no others.

    While it is saved or loaded, the lists of 16-bit parameters and of their fp32 copies hold the fp32 parameters as
    well, each as its own copy, in Adam's order; the distributed optimizer saves them so, too.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    optimizer: Any = Float16OptimizerWithFloat16Params
    for name in ("sharded_state_dict", "load_state_dict"):
        setattr(optimizer, name, _with_fp32_parameters(getattr(optimizer, name)))


def _with_fp32_parameters(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_stub_optimizer:  # it has no parameters
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
    """The distributed optimizer saves shifted state where a gradient buffer has several buckets, with padding between.

    It cuts the padding out, then looks for each parameter at its place with padding, and only logs a warning. There are
    several buckets under --overlap-grad-reduce, and where pipeline stages share the embedding.
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
