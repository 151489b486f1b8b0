"""How a run on this machine, without Slurm, ended: `txssm pretrain` writes RUN/ended.json, `txssm why` reads it."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from megatron_txssm.files import write_json
from megatron_txssm.training.launch.run_lock import Holder, living_holder

_NAME = "ended.json"


class LocalEnd(TypedDict):
    """The contents of ended.json."""

    # Seconds since the epoch.
    ended: float
    exit_code: int
    what: str
    # The file of the rank that failed; empty if none did.
    log: str


def forget_local_end(run: Path) -> None:
    """Called at the next start."""
    with contextlib.suppress(OSError):
        (run / _NAME).unlink()


def note_local_end(run: Path, code: int, what: str, log: str = "") -> None:
    """Called by the launcher when its processes have ended."""
    # Suppressed: a full disk may have ended the run.
    with contextlib.suppress(OSError):
        write_json(run / _NAME, {"ended": time.time(), "exit_code": code, "what": what, "log": log})


def local_end(run: Path) -> LocalEnd | None:
    """What `note_local_end` wrote; None if it did not, as when the launcher was killed, or if it is not readable."""
    try:
        found = json.loads((run / _NAME).read_bytes())
        return LocalEnd(
            ended=float(found["ended"]), exit_code=int(found["exit_code"]), what=str(found["what"]), log=found["log"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def explain_local_end(run: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of what is known about the last run in a folder; empty if there was none."""
    if (holder := living_holder(run, Holder.myself())) is not None:
        yield "training now", str(holder)
        return
    if (end := local_end(run)) is not None:
        yield "ended", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end["ended"]))
        yield "exit code", str(end["exit_code"])
        yield "details", end["what"]
        yield "log", end["log"]
    else:
        # The launcher was killed. The log written last has the most information.
        logs = sorted(run.glob("logs/rank_*.log"), key=lambda path: path.stat().st_mtime)
        if logs:
            yield "ended", "unexpectedly: it was killed, or the machine went down"
            lines = logs[-1].read_text(encoding="utf-8", errors="replace").split("\n")
            yield "last output", next((line.strip() for line in reversed(lines) if line.strip()), "")[:400]
            yield "log", str(logs[-1])
