"""A signal that ends a process lets it clean up first; one process at a time works in a folder."""

import errno
import fcntl
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.files import alone_in, unwound_by_signals


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


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for _ in range(2):
        with (
            alone_in(folder, "--out"),
            pytest.raises(UserError, match=r"another process writes into .*/out; .* with --out"),
            alone_in(folder, "--out"),
        ):
            pass


def test_a_file_system_without_locks_is_used_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refused)
    with alone_in(tmp_path, "--out"):
        pass
