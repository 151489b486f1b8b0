"""Checks of a machine with GPUs, as far as they can be tested without one."""

import os
import subprocess
import sys

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.platform import check_devices
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.session.start import check_gpu


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_devices(2)
    with pytest.raises(UserError, match=r"2 processes on this machine, but 1 GPU; start fewer"):
        check_devices(1)


def test_what_only_a_gpu_has_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some would divide by zero GPUs, or wait forever for a process that did."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for override in ("use_persistent_ckpt_worker=true", "attention_backend=flash"):
        with pytest.raises(UserError, match=rf"megatron\.{override.partition('=')[0]}=.* needs a GPU"):
            check_gpu(load_recipe("demo_cpu", [f"megatron.{override}"]))
    for override in ("tp_comm_overlap=false", "tp_comm_overlap_ag=true", "overlap_grad_reduce=true", "nccl_ub=null"):
        check_gpu(load_recipe("demo_cpu", [f"megatron.{override}"]))


def test_torchs_cudnn_comes_before_the_systems() -> None:
    """All its parts are loaded before the import of Transformer Engine, whose library would load the system's."""
    script = """
import torch
from megatron_txssm.platform import prefer_torchs_cudnn
prefer_torchs_cudnn()
import os
parts = {line.split()[-1] for line in open("/proc/self/maps") if "libcudnn" in line}
print(os.environ.get("CUDNN_HOME"), *sorted(parts))
"""
    environment = {name: value for name, value in os.environ.items() if name != "CUDNN_HOME"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    home, *parts = done.stdout.split()
    if home == "None":
        pytest.skip("this torch came without cuDNN: install the wheel of PyPI")
    assert parts == sorted(
        os.path.join(home, "lib", name) for name in os.listdir(os.path.join(home, "lib")) if ".so" in name
    )


def test_wandb_is_left_to_those_who_use_it() -> None:
    script = """
import sys
from megatron_txssm.platform import prepare_platform
prepare_platform()
from megatron.core import timers
assert timers.wandb is None and not [name for name in sys.modules if name.partition(".")[0] == "wandb"]
import wandb
assert wandb.init
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_cudnn_that_torch_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against (9, 19, 0)")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.cudnn.version", refuse)
    with pytest.raises(UserError, match=r"cuDNN version incompatibility.*; run without LD_LIBRARY_PATH"):
        check_gpu(load_recipe("demo_cpu"))
