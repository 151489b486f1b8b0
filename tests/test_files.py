"""A signal that ends a process lets it clean up first."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_txssm.files import unwound_by_signals


@unwound_by_signals()
def killed(number: int, cleaned: list[int]) -> None:
    try:
        os.kill(os.getpid(), number)
        signal.pause()
    finally:
        cleaned.append(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_a_signal_ends_cleans_up(number: signal.Signals) -> None:
    before, cleaned = signal.getsignal(number), list[int]()
    with pytest.raises(SystemExit) as ended:
        killed(number, cleaned)
    assert ended.value.code == 128 + number and cleaned == [number]
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwound_by_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_signals_alone() -> None:
    def handler() -> object:
        with unwound_by_signals():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() is signal.getsignal(signal.SIGTERM)
