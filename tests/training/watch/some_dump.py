"""A dump of NCCL's flight recorder, as torch 2.13 writes it on a GPU."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_txssm.training.watch.collective_trace import PREFIX


def entry(pg_id: int, group: tuple[str, str], number: int, call: str = "nccl:all_reduce", **more: Any) -> dict:
    """One collective, number `number` of its group."""
    usual = {
        "record_id": 0,
        "pg_id": pg_id,
        "process_group": group,
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "profiling_name": call,
        "input_sizes": ((4, 8),),
        "output_sizes": ((4, 8),),
        "input_dtypes": ["Float"],
        "output_dtypes": ["Float"],
        "time_created_ns": 1_795_674_901_152_972_099,
        "duration_ms": 1.5,
        "frames": [],
        "state": "completed",
        "retired": True,
        "is_p2p": False,
    }
    return usual | more


def write_dump(
    folder: Path, rank: int, entries: list[dict], status: dict[int, tuple[int, int]], ranks: Mapping[Any, str]
) -> None:
    """`status`: pg_id -> (last enqueued, last completed)."""
    trace = {
        "version": "2.10",
        "nccl_version": "2.27.5",
        "pg_config": {
            name: {"name": name, "desc": description, "ranks": members}
            for (name, description), members in ranks.items()
        },
        "pg_status": {
            str(number): {
                "last_enqueued_collective": enqueued,
                "last_started_collective": enqueued,
                "last_completed_collective": completed,
            }
            for number, (enqueued, completed) in status.items()
        },
        "entries": entries,
    }
    (folder / f"{PREFIX}{rank}").write_bytes(pickle.dumps(trace, protocol=2))
