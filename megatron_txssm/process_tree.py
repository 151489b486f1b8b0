"""Signals to the processes that a process started; one that ends meanwhile is no error."""

import contextlib
import signal


def signal_descendants(pid: int, number: signal.Signals, *, recursive: bool = True) -> None:
    """Send `number` to the living descendants of process `pid`, or to its children only."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for descendant in psutil.Process(pid).children(recursive=recursive):
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.send_signal(number)
