"""An attempt without a job, for the tests that judge it."""

from pathlib import Path
from typing import Any

from megatron_txssm.jobs.attempts import Attempt


def some_attempt(run: Path, number: int = 1, **fields: Any) -> Attempt:
    """Four ranks on two nodes, from step 10 on; `fields` are changed. Its folder is there, but nothing is in it."""
    folder = run / "attempts" / f"{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    start: dict[str, Any] = {
        "job_id": "21",
        "nodes": ["n1", "n2"],
        "nproc_per_node": 2,
        "started": 1000.0,
        "saved_before": 10,
        "done_before": 10,
        "metrics_offset": 0,
        "output": None,
        "output_offset": 0,
    }
    return Attempt(folder=folder, **start | fields)
