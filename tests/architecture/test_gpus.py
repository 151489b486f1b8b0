"""Which GPU a device is, by the name that torch gives it."""

import pytest

from megatron_txssm.architecture.gpus import GPUS, gpu_of


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        # Their rates are not those of the GPUs whose names they contain.
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_a_device_is_the_gpu_that_it_names(device: str, name: str | None) -> None:
    gpu = gpu_of(device)
    assert (gpu and gpu.name) == name


def test_names_are_unique() -> None:
    assert len({gpu.name for gpu in GPUS}) == len({gpu.device for gpu in GPUS}) == len(GPUS)
