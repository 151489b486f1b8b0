"""The only file that imports moved or private Megatron names, and that mends what its wheel lacks.

Checked against megatron-core 0.19.2 (tests/test_compat.py); at an upgrade, look here first.
"""

import argparse
import functools
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
    """Repair, once per process, two faults of Megatron 0.19.2 that hit every platform."""
    global _mended
    if _mended:
        return
    _mended = True
    _use_compiled_dataset_helpers()
    _load_optimizer_state_without_grad()


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
