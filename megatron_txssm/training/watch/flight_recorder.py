"""torch's flight recorder: dumps the last collectives of every rank into the attempt's folder when the run hangs.

NCCL's watchdog dumps when a collective times out. The supervisor, which ends a hung step earlier, requests a dump by
SIGUSR2. A separate thread answers, because the main thread is blocked in the collective.
"""

import contextlib
import os
import pickle
import signal
import threading
from pathlib import Path

from megatron_txssm.training.watch.collective_trace import PREFIX, read_trace

# Number of collectives kept, some hundred bytes each.
_BUFFER_SIZE = "2000"


def prepare_recorder(attempt: Path | None) -> None:
    """Set the variables that torch reads when it creates its first process group; existing values are kept.

    `attempt`: the folder for the dumps; without it, only the recorder's times are used (training/watch/stragglers.py).
    """
    # For collectives on a GPU: otherwise the recorder has no durations.
    settings: dict[tuple[str, ...], str] = {("TORCH_NCCL_ENABLE_TIMING",): "1"}
    # The names since torch 2.10, and the earlier ones.
    settings["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"] = _BUFFER_SIZE
    if attempt is not None:
        settings[("TORCH_NCCL_DUMP_ON_TIMEOUT",)] = "1"
        settings["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(attempt / PREFIX)
    for names, value in settings.items():
        stated = next((os.environ[name] for name in names if name in os.environ), value)
        os.environ |= dict.fromkeys(names, stated)


def dump_when_asked(attempt: Path, rank: int) -> None:
    """On SIGUSR2, write this rank's dump. Call it before faulthandler.register(…, chain=True), in the main thread."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    # Python's own handler runs only when the main thread returns; the wakeup byte is written at once.
    signal.signal(signal.SIGUSR2, lambda *_: None)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)

    def answer() -> None:
        while numbers := os.read(readable, 64):
            if signal.SIGUSR2 in numbers:
                # The disk may be full, or there may be no process group yet.
                with contextlib.suppress(Exception):
                    write_dump(attempt / f"{PREFIX}{rank}")

    threading.Thread(target=answer, name="flight recorder", daemon=True).start()


def write_dump(path: Path) -> None:
    """Write this process's last collectives, without stacks, which are in the rank's log."""
    import torch.distributed
    from torch._C import _distributed_c10d as c10d

    if torch.distributed.get_backend() == "nccl":
        dump: bytes = c10d._dump_nccl_trace(True, False, False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        # gloo's recorder (torch >= 2.10) does not list a group's members.
        trace = read_trace(c10d._dump_fr_trace(True, False, False))  # pyright: ignore[reportAttributeAccessIssue]
        dump = pickle.dumps(trace | {"pg_config": _groups()})
    # Written atomically.
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(dump)
    part.replace(path)


def _groups() -> dict[str, dict[str, str]]:
    """This process's groups, in the format of NCCL's recorder."""
    import torch.distributed

    names = torch.distributed.distributed_c10d._world.pg_names
    return {
        name: {
            "name": name,
            "desc": group.group_desc,
            "ranks": str(torch.distributed.get_process_group_ranks(group)),
        }
        for group, name in list(names.items())
    }
