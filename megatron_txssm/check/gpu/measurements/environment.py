"""Lists what is installed on this node, and checks that it can be imported together."""

import contextlib
import importlib
import importlib.metadata
import os
import platform
from typing import Any

# Common name: (module that imports all of it, distribution, consequence if missing).
PACKAGES = {
    "megatron-core": ("megatron.core", "megatron-core", "nothing trains"),
    "transformers": ("transformers", "transformers", "no export, no decoding"),
}
# Not used on a CPU, even if installed.
PACKAGES_OF_GPUS = {
    "Transformer Engine": ("transformer_engine.pytorch", "transformer-engine", "local modules only, no FP8"),
    "mamba-ssm": ("mamba_ssm.ops.triton.ssd_combined", "mamba-ssm", "the scan runs in PyTorch, many times slower"),
    "causal-conv1d": ("causal_conv1d", "causal-conv1d", "the baselines' convolution runs in PyTorch"),
    "apex": ("apex", "apex", "Transformer Engine's kernels, or Megatron's own, serve instead"),
}


def describe(device: str) -> dict[str, Any]:
    """{"machine": a sentence, "versions", "packages": name -> "right", "not installed: ..." or the import error}."""
    from megatron_txssm.platform import prepare_platform

    prepare_platform()
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        versions |= {"CUDA": torch.version.cuda or "", "cuDNN": str(torch.backends.cudnn.version())}
        machine = f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
    else:
        machine = f"{len(os.sched_getaffinity(0))} cores, no GPU, "
    with contextlib.suppress(ImportError):
        versions["Triton"] = importlib.import_module("triton").__version__
    wanted = PACKAGES | (PACKAGES_OF_GPUS if device == "cuda" else {})
    packages = {}
    for name, (module, distribution, lack) in wanted.items():
        packages[name] = _imported(module, lack)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(distribution)
    machine += ", ".join(f"{name} {version}" for name, version in versions.items() if name not in wanted)
    return {"machine": machine, "versions": versions, "packages": packages}


def _imported(module: str, lack: str) -> str:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return f"not installed: {lack}"
        return f"cannot be imported: {error}"
    except Exception as error:  # a broken installation may raise anything: OSError, RuntimeError, AttributeError ...
        return f"cannot be imported: {type(error).__name__}: {error}"[:300]
    return "right"
