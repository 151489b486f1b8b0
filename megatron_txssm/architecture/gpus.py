"""GPUs by their data sheets: peaks, memory and links, for MFU and for planning."""

import re
from dataclasses import dataclass

GB, TB, TERA = 10**9, 10**12, 10**12


@dataclass(frozen=True)
class Gpu:
    """Rates are per second and per GPU; a link's is that of one direction.

    NVIDIA's data sheets, without sparsity; SXM, or as named.

    Attributes:
        name: as `txssm plan --gpu` takes it
        device: what `torch.cuda.get_device_name` contains, as whole words
        capability: CUDA's compute capability
        bf16_flops: peak of dense matrix products
        fp8_flops: likewise; None: without FP8
        memory_bytes: what the driver reports for one GPU, less what its context takes
        memory_bandwidth: of HBM
        node_bandwidth: to the node's other GPUs
        network_bandwidth: to other nodes, with the usual one adapter per GPU
        per_node: GPUs in a usual node
    """

    name: str
    device: str
    capability: tuple[int, int]
    bf16_flops: float
    fp8_flops: float | None
    memory_bytes: int
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    per_node: int = 8


GIB = 2**30
# The more specific device names first.
GPUS = (
    Gpu("a100-40", "A100-SXM4-40GB", (8, 0), 312 * TERA, None, 39 * GIB, 1.555 * TB, 300 * GB, 25 * GB),
    Gpu("a100-80", "A100", (8, 0), 312 * TERA, None, 79 * GIB, 2.039 * TB, 300 * GB, 25 * GB),
    Gpu("h100-pcie", "H100 PCIe", (9, 0), 756 * TERA, 1513 * TERA, 79 * GIB, 2.0 * TB, 64 * GB, 25 * GB),
    Gpu("h100-nvl", "H100 NVL", (9, 0), 835 * TERA, 1671 * TERA, 93 * GIB, 3.9 * TB, 64 * GB, 25 * GB),
    Gpu("h100-sxm", "H100", (9, 0), 989 * TERA, 1979 * TERA, 79 * GIB, 3.35 * TB, 450 * GB, 50 * GB),
    Gpu("h200-nvl", "H200 NVL", (9, 0), 835 * TERA, 1671 * TERA, 139 * GIB, 4.8 * TB, 64 * GB, 25 * GB),
    Gpu("h200", "H200", (9, 0), 989 * TERA, 1979 * TERA, 139 * GIB, 4.8 * TB, 450 * GB, 50 * GB),
    Gpu("b200", "B200", (10, 0), 2250 * TERA, 4500 * TERA, 178 * GIB, 8.0 * TB, 900 * GB, 50 * GB),
    Gpu("l40s", "L40S", (8, 9), 362 * TERA, 733 * TERA, 44 * GIB, 0.864 * TB, 32 * GB, 25 * GB),
)


def gpu_of(device: str) -> Gpu | None:
    """The GPU that torch names `device`; None if its peak is not known."""
    # Whole words: a GH200 or GB200 has other rates.
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.device}\b", device)), None)
