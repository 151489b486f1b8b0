"""What is asked of a machine with GPUs, as far as it can be asked without one."""

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.platform import check_devices


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_devices(2)
    with pytest.raises(UserError, match=r"2 processes on this machine, but 1 GPU; start fewer"):
        check_devices(1)
