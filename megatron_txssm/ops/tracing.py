"""Detects whether an operator runs eagerly under autograd, or is traced, exported or transformed (torch.func)."""

import torch
from torch import Tensor


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether operators are being traced or transformed, or one of `tensors` is not a plain tensor.

    If so, buffers must not be reused between calls, because the trace would be bound to them; `out=` must not be used,
    because compilers and vmap reject it; and most tracers cannot see into a torch.autograd.Function.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or not all(map(_is_plain, tensors))


def _is_plain(tensor: Tensor | None) -> bool:
    """False for subclasses (fake tensors, DTensors) and for torch.func's wrappers."""
    if tensor is None:
        return True
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return False
    # There is no public way to recognise torch.func's wrappers.
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]
