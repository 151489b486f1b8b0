"""Who looks on while an operator runs: nothing but autograd, or a compiler, an exporter, a transform of functions."""

import torch
from torch import Tensor


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether operators are recorded or transformed, or run on stand-ins for tensors, now or in one of `tensors`.

    Then no memory may be kept from call to call, for what is recorded would be bound to it; nothing may be written
    through `out=`, which compilers and vmap refuse; and a torch.autograd.Function is opaque to most.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or not all(map(_is_plain, tensors))


def _is_plain(tensor: Tensor | None) -> bool:
    """Whether it is nothing but memory: no subclass (a fake tensor, a DTensor), no wrapper of torch.func."""
    if tensor is None:
        return True
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return False
    # torch.func wraps tensors in its own, which have no public mark.
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]
