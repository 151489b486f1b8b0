"""Where the trainer runs: on GPUs, or without any, on the CPU and gloo through an adapter."""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_txssm.errors import UserError

# Transformer Engine 2.20 needs it to resume runs with delayed FP8 scaling, whose history it saves as a pickle. Megatron
# loads the other pickles in its checkpoints anyway: the README says which checkpoints to trust.
ALLOW_EXTRA_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def prepare_platform() -> list[str]:
    """Make Megatron run on this machine; returns the Megatron arguments that the machine needs.

    Call it before the first import of Megatron. Only this function chooses the platform.
    """
    # Megatron requires it before Blackwell: with one queue, a collective starts before the GEMM that it overlaps with.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    if torch.cuda.is_available():
        check_devices(torch.cuda.device_count())
        os.environ.setdefault(ALLOW_EXTRA_STATE, "1")
        prefer_torchs_cudnn()
        with _without_wandb():
            arguments = _without_missing_kernels()
            import megatron.core.timers  # noqa: F401
        return arguments
    from megatron_txssm.platform import cpu

    with _without_wandb():
        cpu.install()
    return list(cpu.MEGATRON_ARGUMENTS)


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    """Without wandb, whose import takes most of a second of every process, for the first import of Megatron's timers.

    They only compare their writer with it: W&B's runs are begun by training/watch/tracker_backends.py.
    """
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["wandb"]


def _without_missing_kernels() -> list[str]:
    """Megatron arguments for machines without apex or Transformer Engine, which its defaults require."""
    arguments: list[str] = []
    has_transformer_engine = importlib.util.find_spec("transformer_engine") is not None
    if not has_transformer_engine:
        from megatron_txssm.platform.adam import stand_in_for_fused_adam

        stand_in_for_fused_adam()
        arguments.append("--no-rope-fusion")
    # apex's kernel; without it Megatron's own linear layers cannot be built unless the fusion is off.
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        if has_transformer_engine:
            from megatron_txssm.platform.gradient_accumulation import stand_in_for_apex

            stand_in_for_apex()
        else:
            arguments.append("--no-gradient-accumulation-fusion")
    return arguments


def prefer_torchs_cudnn() -> None:
    """Load all libraries of torch's cuDNN before Transformer Engine loads the system's.

    torch refuses to work beside another cuDNN release, and Transformer Engine takes cuDNN from the CUDA toolkit or from
    /usr/lib, which may have an older one.
    """
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libcudnn.so" in line}
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        home = Path(folder).resolve() / "cudnn"
        if not any(Path(library).is_relative_to(home) for library in loaded):
            # This torch uses another cuDNN.
            continue
        # Transformer Engine's library links to every part.
        for library in sorted(home.glob("lib/libcudnn*.so.*")):
            # If a part cannot be loaded, Transformer Engine fails, too, with a better message.
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        os.environ.setdefault("CUDNN_HOME", str(home))


def check_devices(count: int) -> None:
    """UserError if the run has more processes on this machine than its `count` GPUs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > count:
        raise UserError(
            f"{processes} processes on this machine, but {count} GPU{'s' if count > 1 else ''}; "
            "start fewer (--nproc), or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
