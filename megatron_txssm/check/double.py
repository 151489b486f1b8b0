"""Everything that is fp32 computed in fp64, in a process of its own: what still differs is no rounding.

In fp32, equal layouts may differ by 1e-2: where a gradient is what is left of terms that cancel (that of a state-space
layer's C at the first token of a document, under a gated norm that spans one head), and more with every step. A fault
of that size would not show.
"""

import importlib
import io
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_mode: TorchFunctionMode | None = None


def compute_in_double() -> None:
    """Let fp32 mean fp64 in whatever is imported from here on: Megatron and this package. Once a process, on a CPU."""
    global _mode
    assert _mode is None, "fp32 is fp64 already"
    # Both make tables by type, while there are two.
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
    """Megatron's optimizers sort parameters by the name of their type, and know no double."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("DoubleTensor", "FloatTensor")
        return result
