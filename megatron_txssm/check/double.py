"""Computes everything that is fp32 in fp64, in a separate process, so that remaining differences are not rounding.

In fp32, correct layouts may differ by 1e-2 where a gradient's terms cancel (such as that of a state-space layer's C at
the first token of a document, under a gated norm that spans one head), and by more with every step. Faults of that size
would stay hidden.
"""

import importlib
import io
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_mode: TorchFunctionMode | None = None


def compute_in_double() -> None:
    """Make fp32 mean fp64 in all later imports: Megatron and this package. Once per process, on a CPU."""
    global _mode
    assert _mode is None, "fp32 is fp64 already"
    # Both build tables keyed by dtype, while fp32 and fp64 are still distinct.
    importlib.import_module("torch._dynamo")
    torch.save(torch.zeros(1), io.BytesIO())
    torch.set_default_dtype(torch.float64)
    for holder, name, double in (
        (torch, "float32", torch.float64),
        (torch, "float", torch.float64),
        (torch.Tensor, "float", torch.Tensor.double),
    ):
        setattr(holder, name, double)
    _mode = _DoubleIsFloat()
    _mode.__enter__()


class _DoubleIsFloat(TorchFunctionMode):
    """Megatron's optimizers sort parameters by the name of their type, and do not know double."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("DoubleTensor", "FloatTensor")
        return result
