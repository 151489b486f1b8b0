"""What is set for torch's flight recorder before torch makes its first process group."""

import os
from pathlib import Path

import pytest

from megatron_txssm.training.watch.flight_recorder import prepare_recorder


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set here is gone afterwards."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TORCH_FR_", "TORCH_NCCL_"))
    }
    monkeypatch.setattr(os, "environ", environment)


def settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("TORCH_FR_", "TORCH_NCCL_"))}


def test_the_recorder_dumps_into_the_folder_of_the_attempt(tmp_path: Path) -> None:
    prepare_recorder(tmp_path)
    assert settings() == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_ENABLE_TIMING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/collectives_rank_",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{tmp_path}/collectives_rank_",
    }


def test_without_a_job_it_only_records() -> None:
    prepare_recorder(None)
    assert set(settings()) == {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_ENABLE_TIMING"}


def test_what_the_site_has_set_holds(tmp_path: Path) -> None:
    os.environ |= {"TORCH_NCCL_ENABLE_TIMING": "0", "TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}
    prepare_recorder(tmp_path)
    assert settings()["TORCH_NCCL_ENABLE_TIMING"] == "0"
    # By its other name, too.
    assert settings()["TORCH_FR_BUFFER_SIZE"] == settings()["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7"
