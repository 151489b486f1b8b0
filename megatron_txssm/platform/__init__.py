"""Where the trainer runs: GPUs by default, or Megatron's CPU and gloo adapter where there is none."""

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path

from megatron_txssm.errors import UserError

# Without it Transformer Engine 2.20 refuses to resume a run of delayed FP8 scaling, whose history it saves as a pickle.
# A checkpoint of Megatron holds others, which Megatron loads in any case: see the README on whose to load.
ALLOW_EXTRA_STATE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def prepare_platform() -> list[str]:
    """Make Megatron run on this machine; returns the Megatron arguments that the machine needs.

    Call it before the first import of Megatron. Here alone the platform is chosen.
    """
    # Megatron insists on it before Blackwell: with one queue, a collective starts before the GEMM it shall overlap.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    if torch.cuda.is_available():
        check_devices(torch.cuda.device_count())
        os.environ.setdefault(ALLOW_EXTRA_STATE, "1")
        prefer_torchs_cudnn()
        return _without_missing_kernels()
    from megatron_txssm.platform import cpu

    cpu.install()
    return list(cpu.MEGATRON_ARGUMENTS)


def _without_missing_kernels() -> list[str]:
    """What Megatron must be told where apex or Transformer Engine is not installed: its defaults ask for both."""
    arguments: list[str] = []
    has_transformer_engine = importlib.util.find_spec("transformer_engine") is not None
    if not has_transformer_engine:
        from megatron_txssm.platform.adam import stand_in_for_fused_adam

        stand_in_for_fused_adam()
        arguments.append("--no-rope-fusion")
    # apex's kernel; Megatron's own linear layers refuse to be built without it unless told.
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        if has_transformer_engine:
            from megatron_txssm.platform.gradient_accumulation import stand_in_for_apex

            stand_in_for_apex()
        else:
            arguments.append("--no-gradient-accumulation-fusion")
    return arguments


def prefer_torchs_cudnn() -> None:
    """Load all of the cuDNN of which torch has loaded a part, before Transformer Engine loads the system's.

    torch refuses to work beside another release of it, and Transformer Engine takes cuDNN from where the CUDA toolkit
    is, or from /usr/lib, which may have an older one.
    """
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libcudnn.so" in line}
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        home = Path(folder).resolve() / "cudnn"
        if not any(Path(library).is_relative_to(home) for library in loaded):
            # torch works with another one.
            continue
        # Transformer Engine's own library names each part.
        for library in sorted(home.glob("lib/libcudnn*.so.*")):
            # One that lacks something here would fail in Transformer Engine, too, which says more.
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        os.environ.setdefault("CUDNN_HOME", str(home))


def check_devices(count: int) -> None:
    """UserError where this machine has more processes of the run than its `count` GPUs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > count:
        raise UserError(
            f"{processes} processes on this machine, but {count} GPU{'s' if count > 1 else ''}; "
            "start fewer (--nproc), or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
