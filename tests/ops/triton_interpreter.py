"""mamba-ssm's Triton kernels on CPU tensors, under Triton's interpreter; a pytest plugin (-p triton_interpreter).

It works around three obstacles on a machine without a GPU: the package's __init__ imports compiled modules, so it is
not run; the kernels query torch.cuda for the current device and its size; and the interpreter (Triton 3.7) multiplies
bf16 matrices as the integers that hold their bits.
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import Any

import numpy as np
import torch


def install() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1" and "triton" not in sys.modules, "Triton decides when it is imported"
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None and spec.submodule_search_locations is not None
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = importlib.machinery.ModuleSpec("mamba_ssm", None, is_package=True)
    sys.modules["mamba_ssm"] = package

    cuda: Any = torch.cuda
    cuda.device = lambda index: contextlib.nullcontext()
    # Kernels use it to decide how many heads of a group one program sums.
    processors = int(os.environ.get("INTERPRETED_PROCESSORS", "1"))
    cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=processors)
    _multiply_bf16()

    # torch.empty returns NaN (torch fills it in deterministic mode), which exposes a kernel that forgets to write.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)


def _multiply_bf16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def widened(matrix: Any) -> Any:
        if matrix.dtype.scalar != tl.bfloat16:
            return matrix
        # A bf16 number is the upper half of an fp32 one.
        bits = matrix.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


install()
