"""What is asked of a machine with GPUs, as far as it can be asked without one."""

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.platform import check_devices, check_gpu
from megatron_txssm.recipe.loader import load_recipe


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_devices(2)
    with pytest.raises(UserError, match=r"2 processes on this machine, but 1 GPU; start fewer"):
        check_devices(1)


def test_what_only_a_gpu_has_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of it would end in a division by zero GPUs, or wait for ever for a process that died of that."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for override in ("use_persistent_ckpt_worker=true", "attention_backend=flash"):
        with pytest.raises(UserError, match=rf"megatron\.{override.partition('=')[0]}=.* needs a GPU"):
            check_gpu(load_recipe("demo_cpu", [f"megatron.{override}"]))
    for override in ("tp_comm_overlap=false", "tp_comm_overlap_ag=true", "overlap_grad_reduce=true", "nccl_ub=null"):
        check_gpu(load_recipe("demo_cpu", [f"megatron.{override}"]))
