"""Signals to descendants, also where some end before they are sent theirs."""

import os
import signal
import subprocess

import psutil
import pytest

from megatron_txssm.process_tree import signal_descendants


def test_one_that_has_ended_meanwhile_does_not_spare_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["true"]) as ended:
        gone = psutil.Process(ended.pid)
    with subprocess.Popen(["sleep", "600"]) as living:
        found = [gone, psutil.Process(living.pid)]
        monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: found)
        signal_descendants(os.getpid(), signal.SIGKILL)
        assert living.wait() == -signal.SIGKILL


@pytest.mark.parametrize("recursive", [False, True])
def test_grandchildren(recursive: bool) -> None:
    shell = "sh -c 'sleep 600 & echo $!; wait' & wait"
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = psutil.Process(int(process.stdout.readline()))
        signal_descendants(process.pid, signal.SIGTERM, recursive=recursive)
        process.wait()  # its child has ended
        if not recursive:
            assert grandchild.is_running()
            grandchild.kill()
        assert process.stdout.read() == ""  # returns when nobody writes any more


def test_a_process_that_is_gone_has_no_descendants() -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    signal_descendants(ended.pid, signal.SIGKILL)
