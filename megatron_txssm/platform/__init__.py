"""Where the trainer runs: GPUs by default, or Megatron's CPU and gloo adapter where there is none."""

import importlib.util
import os
from typing import TYPE_CHECKING

from megatron_txssm.errors import UserError

if TYPE_CHECKING:
    from megatron_txssm.recipe.recipe import Recipe


def prepare_platform() -> list[str]:
    """Make Megatron run on this machine; returns the Megatron arguments that the machine needs.

    Call it before the first import of Megatron. Only this file asks whether there is a GPU.
    """
    # Megatron insists on it before Blackwell: with one queue, a collective starts before the GEMM it shall overlap.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    if torch.cuda.is_available():
        check_devices(torch.cuda.device_count())
        # apex's kernel; Megatron's own linear layers refuse to be built without it unless told.
        fused = importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
        return [] if fused else ["--no-gradient-accumulation-fusion"]
    from megatron_txssm.platform import cpu

    cpu.install()
    return list(cpu.MEGATRON_ARGUMENTS)


def check_devices(count: int) -> None:
    """UserError where this machine has more processes of the run than its `count` GPUs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > count:
        raise UserError(
            f"{processes} processes on this machine, but {count} GPU{'s' if count > 1 else ''}; "
            "start fewer (--nproc), or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def check_gpu(recipe: "Recipe") -> None:
    """UserError where this process's GPU cannot do what the recipe asks of one."""
    import torch

    from megatron_txssm.recipe.fp8_checks import check_fp8_on

    if not torch.cuda.is_available():
        return
    # 92000 is cuDNN 9.20.0.
    cudnn = torch.backends.cudnn.version() or 0
    check_fp8_on(recipe, torch.cuda.get_device_capability(), (cudnn // 10000, cudnn // 100 % 100, cudnn % 100))
