"""What squeue answers, for a stand-in on PATH."""

from collections.abc import Mapping
from pathlib import Path

LETTERS = {
    "job_id": "%i",
    "name": "%j",
    "state": "%T",
    "reason": "%r",
    "nodes": "%N",
    "partition": "%P",
    "command": "%o",
    "excluded": "%x",
    "end_time": "%e",
    "folder": "%Z",
}
# Says what is in `queue` beside it, each job in the format that it is asked for; keeps its arguments and variables.
SQUEUE = """\
#!/bin/bash
here=$(dirname "$0")
printf '%s\\n' "$@" > "$here/squeue.args"
env > "$here/squeue.env"
cat "$here/queue"
"""


def answer(*jobs: Mapping[str, str | int]) -> str:
    """A line for each job, as squeue of Slurm 22.05 answers to `queue()`."""
    usual = {"name": "x", "state": "RUNNING", "reason": "None", "nodes": "n1", "partition": "main", "end_time": "N/A"}
    usual |= {"folder": "/home/somebody", "command": "/scripts/other.sh"}
    rows = [{**usual, **job} for job in jobs]
    return "".join("\x1e" + "\x1f".join(str(row.get(name, "")) for name in LETTERS) + "\n" for row in rows)


def write_queue(folder: Path, *jobs: Mapping[str, str | int]) -> None:
    """A squeue in `folder` that shows these jobs."""
    (folder / "squeue").write_text(SQUEUE)
    (folder / "squeue").chmod(0o755)
    (folder / "queue").write_text(answer(*jobs))
