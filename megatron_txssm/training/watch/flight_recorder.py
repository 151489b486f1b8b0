"""torch's flight recorder: the last collectives of every rank, dumped into the attempt's folder when the run hangs.

NCCL's watchdog dumps by itself when a collective times out. The supervisor, which ends a hung step sooner, asks by
SIGUSR2, to which a thread answers: the main one sits in the collective.
"""

import contextlib
import os
import pickle
import signal
import threading
from pathlib import Path

from megatron_txssm.training.watch.collective_trace import PREFIX, read_trace

# Collectives that are kept, each some hundred bytes.
_BUFFER_SIZE = "2000"


def prepare_recorder(attempt: Path | None) -> None:
    """Set what torch reads when it makes its first process group; what the site has set holds.

    `attempt`: the folder for the dumps; without one only the recorder's times are used (training/watch/stragglers.py).
    """
    # Of every collective on a GPU: without it, the recorder has no durations.
    settings: dict[tuple[str, ...], str] = {("TORCH_NCCL_ENABLE_TIMING",): "1"}
    # The names from torch 2.10 on, and those before.
    settings["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"] = _BUFFER_SIZE
    if attempt is not None:
        settings[("TORCH_NCCL_DUMP_ON_TIMEOUT",)] = "1"
        settings["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(attempt / PREFIX)
    for names, value in settings.items():
        stated = next((os.environ[name] for name in names if name in os.environ), value)
        os.environ |= dict.fromkeys(names, stated)


def dump_when_asked(attempt: Path, rank: int) -> None:
    """At SIGUSR2 write this rank's dump. Call it before faulthandler.register(…, chain=True), in the main thread."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    # Python's own handler would run in the main thread, when that comes back; the byte is written at once.
    signal.signal(signal.SIGUSR2, lambda *_: None)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)

    def answer() -> None:
        while numbers := os.read(readable, 64):
            if signal.SIGUSR2 in numbers:
                # A full disk, or no process group yet.
                with contextlib.suppress(Exception):
                    write_dump(attempt / f"{PREFIX}{rank}")

    threading.Thread(target=answer, name="flight recorder", daemon=True).start()


def write_dump(path: Path) -> None:
    """This process's last collectives, without the stacks, which stand in the rank's log."""
    import torch.distributed
    from torch._C import _distributed_c10d as c10d

    if torch.distributed.get_backend() == "nccl":
        dump: bytes = c10d._dump_nccl_trace(True, False, False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        # gloo's recorder, which torch has since 2.10, does not say who belongs to a group.
        trace = read_trace(c10d._dump_fr_trace(True, False, False))  # pyright: ignore[reportAttributeAccessIssue]
        dump = pickle.dumps(trace | {"pg_config": _groups()})
    # Whole or not at all.
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(dump)
    part.replace(path)


def _groups() -> dict[str, dict[str, str]]:
    """This process's groups, as NCCL's recorder describes them."""
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
