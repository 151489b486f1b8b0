"""How a run on this machine, without Slurm, ended: `txssm pretrain` writes RUN/ended.json, `txssm why` reads it."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_txssm.files import write_json
from megatron_txssm.holders import Holder, living_holder
from megatron_txssm.typed_json import is_date, read_json, typed_fields

_NAME = "ended.json"


def forget_local_end(run: Path) -> None:
    """Called at the next start."""
    with contextlib.suppress(OSError):
        (run / _NAME).unlink()


def note_local_end(run: Path, code: int, what: str, log: str = "") -> None:
    """Called by the launcher when its processes have ended."""
    # Suppressed: a full disk may have ended the run.
    with contextlib.suppress(OSError):
        write_json(run / _NAME, {"ended": time.time(), "exit_code": code, "what": what, "log": log})


class LocalEnd(NamedTuple):
    """How the last run in a folder ended."""

    # Seconds since the epoch.
    ended: float
    exit_code: int
    what: str
    # Of the rank that failed; empty if none did.
    log: str


def local_end(run: Path) -> LocalEnd | None:
    """None if the run trains, was killed together with its launcher, or ran on Slurm only."""
    try:
        end = LocalEnd(**typed_fields(read_json(run / _NAME), LocalEnd))
    except (OSError, ValueError, TypeError):
        return None
    return end if is_date(end.ended) else None


def explain_local_end(run: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of what is known about the last run in a folder; empty if there was none."""
    if (holder := living_holder(run, Holder.myself())) is not None:
        yield "training now", str(holder)
        return
    if (end := local_end(run)) is not None:
        yield "ended", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end.ended))
        yield "exit code", str(end.exit_code)
        yield "details", end.what
        yield "log", end.log
    else:
        # The launcher was killed. The log written last has the most information.
        logs = sorted(run.glob("logs/rank_*.log"), key=lambda path: path.stat().st_mtime)
        if logs:
            yield "ended", "unexpectedly: it was killed, or the machine went down"
            lines = logs[-1].read_text(encoding="utf-8", errors="replace").split("\n")
            yield "last output", next((line.strip() for line in reversed(lines) if line.strip()), "")[:400]
            yield "log", str(logs[-1])
