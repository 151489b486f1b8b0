"""Megatron on CPU and gloo: maps Megatron's uses of CUDA to the CPU.

Megatron refers to CUDA in a few ways: device names, functions of torch.cuda, tensor type strings, streams and random
generators. Each is mapped once; Megatron's files are not changed. `install` refuses to run where there is a GPU.
"""

import collections
import contextlib
import functools
import importlib
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

# Fused kernels need a GPU, apex or Transformer Engine; gloo is the collective library for CPU tensors.
MEGATRON_ARGUMENTS = (
    "--distributed-backend=gloo",
    "--transformer-impl=local",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
)

_installed: TorchFunctionMode | None = None


def install() -> None:
    """Map CUDA to the CPU for this process (idempotent). RuntimeError if a GPU is present.

    Call it before the first import of Megatron, in every process, from the thread that trains: the device mapping is a
    TorchFunctionMode, which belongs to a thread.
    """
    global _installed
    if _installed is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "the CPU adapter is for machines without a GPU; hide it with CUDA_VISIBLE_DEVICES= to use it"
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("prepare_platform() must come before the first import of Megatron")
    # Megatron's modules decorate small functions with torch.compile, which cannot tell mapped functions of torch.cuda
    # apart: it must be imported before the mapping, with this variable set when it decorates.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    importlib.import_module("torch._dynamo")
    # On a machine with hidden GPUs they may be installed, and Megatron would call their kernels.
    for package in ("transformer_engine", "apex"):
        sys.modules.setdefault(package, None)  # pyright: ignore[reportArgumentType]
    _map_torch_cuda(torch.cuda)
    _installed = _CudaNamesToCpu()
    _installed.__enter__()
    _adapt_megatron()


class _CudaNamesToCpu(TorchFunctionMode):
    """Redirect explicit CUDA devices in torch calls to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        # Pinned memory requires a device.
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers sort parameters by names such as 'torch.cuda.FloatTensor' and reject all others.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _names_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """Stream operations need no action: a CPU executes in order."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, *_: object) -> None: ...
    def wait_event(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class _Event:
    """A point in time."""

    def __init__(self, *_: object, **__: object) -> None:
        self.seconds = 0.0

    def record(self, *_: object) -> None:
        self.seconds = time.perf_counter()

    def wait(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        """Milliseconds to `end`, as torch.cuda.Event gives them."""
        return (end.seconds - self.seconds) * 1e3


class _CpuGenerators:
    """torch.cuda.default_generators[i]: the CPU generator for every device."""

    def __getitem__(self, _: object) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


class _DeviceContext(contextlib.nullcontext):
    """`with torch.cuda.device(i)`."""

    def __init__(self, *_: object) -> None:
        super().__init__()


def _map_torch_cuda(cuda: Any) -> None:
    stream = _Stream()
    functions = {
        # Device queries. device_count gates Megatron's initialisation of model parallelism and must be positive.
        "current_device": lambda: CPU,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "set_device": _nothing,
        "get_device_name": lambda *_: "cpu",
        "get_device_capability": lambda *_: (0, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            name="cpu", major=0, minor=0, total_memory=_physical_memory_bytes(), multi_processor_count=os.cpu_count()
        ),
        # The CPU generator replaces the GPU's. _lazy_call must call immediately: torch defers the restoring of random
        # states until CUDA is initialised, which never happens, so a resumed run would silently draw other numbers.
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": _nothing,  # torch.manual_seed calls it after seeding the CPU generator itself
        "_lazy_call": lambda call, **_: call(),
        "_lazy_init": _nothing,
        # Synchronisation and memory.
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "current_stream": lambda *_, **__: stream,
        "default_stream": lambda *_, **__: stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda *_, **__: _peak_memory_bytes(),
        "max_memory_allocated": lambda *_, **__: _peak_memory_bytes(),
        "memory_reserved": lambda *_, **__: _peak_memory_bytes(),
        "max_memory_reserved": lambda *_, **__: _peak_memory_bytes(),
        "reset_peak_memory_stats": _nothing,
        "memory_stats": lambda *_, **__: collections.defaultdict(int),
    }
    for name, function in functions.items():
        setattr(cuda, name, function)
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    cuda.default_generators = _CpuGenerators()
    cuda.Stream, cuda.Event, cuda.device = _Stream, _Event, _DeviceContext
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing


def _nothing(*_: object, **__: object) -> None: ...


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_memory_bytes() -> int:
    """This process's peak resident size, including libraries: there is no allocator to query."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _adapt_megatron() -> None:
    """Patches what Megatron itself rejects or cannot do without CUDA, apex and Transformer Engine."""
    import megatron.core.distributed.param_and_grad_buffer as param_and_grad_buffer
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    from megatron_txssm.platform.adam import stand_in_for_fused_adam
    from megatron_txssm.platform.token_exchange import adapt_token_exchange

    # pretrain() requires a GPU, and has no argument to allow none.
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    # --tp-comm-overlap only concerns Transformer Engine's layers.
    initialize._initialize_tp_communicators = _nothing
    stand_in_for_fused_adam()
    param_and_grad_buffer._coalescing_manager = coalesce_by_dtype
    adapt_token_exchange()
    # Megatron warns that the CPU generator moved while it forked the GPU's: here they are the same.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


@contextlib.contextmanager
def coalesce_by_dtype(
    group: torch.distributed.ProcessGroup, device: torch.device | None = None, async_ops: bool = False
) -> Iterator[distributed_c10d._CoalescingManager]:
    """torch's _coalescing_manager, one call for each dtype.

    Gloo (torch 2.13) gathers all tensors of a coalesced call in the first one's dtype and silently returns garbage:
    with virtual pipeline stages, for the weights of a bf16 model with fp32 parameters.
    """
    assert device is None, "gloo coalesces the calls that torch has collected, not those of a device"
    collected = distributed_c10d._world.pg_coalesce_state
    assert not collected.get(group), "calls are being coalesced already"
    # Not inside an assert, which python -O removes: torch coalesces the calls of groups in this dict.
    collected.setdefault(group, [])
    manager = distributed_c10d._CoalescingManager()
    yield manager
    calls = collected.pop(group)
    for dtype in dict.fromkeys(call.tensor.dtype for call in calls):
        with distributed_c10d._coalescing_manager(group, async_ops=async_ops) as part:
            collected[group].extend(call for call in calls if call.tensor.dtype == dtype)
        manager.works.extend(part.works)
