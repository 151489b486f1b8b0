"""Slurm's commands as scripts, and `txssm submit` of a demo to them."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_txssm.cli.main import main
from tests.slurm.some_queue import write_queue

# Says no to a script that states what `refuse` names, or to its nth submission; keeps what it was given.
SBATCH = """\
#!/bin/bash
here=$(dirname "$0")
file=${@: -1}
[ "$file" = --test-only ] && file=/dev/stdin
text=$(cat "$file")
if [ -e "$here/refuse" ] && grep -q -f "$here/refuse" <<< "$text"; then
    echo "sbatch: error: Batch job submission failed: Invalid partition name specified" >&2
    exit 1
fi
[ "$1" = --test-only ] && { echo "sbatch: Job 3 to start at noon" >&2; exit 0; }
number=$(( $(ls "$here/queued" | wc -l) + 1 ))
if [ "$number" = "$(cat "$here/refuse_number" 2> /dev/null)" ]; then
    echo "sbatch: error: Socket timed out on send/recv operation" >&2
    exit 1
fi
printf '%s\\n' "$@" > "$here/queued/$number"
env > "$here/environment"
cat "$here/answer" 2> /dev/null || echo "$((100 + number))"
"""
SCANCEL = """\
#!/bin/bash
printf '%s\\n' "$@" >> "$(dirname "$0")/cancelled"
"""


@dataclass
class Cluster:
    folder: Path

    @property
    def queued(self) -> list[list[str]]:
        """The words of each submission."""
        paths = sorted((self.folder / "queued").iterdir(), key=lambda path: int(path.name))
        return [path.read_text().splitlines() for path in paths]

    @property
    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def environment(self) -> dict[str, str]:
        lines = (self.folder / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def holds(self, *jobs: dict) -> None:
        """What squeue shows."""
        write_queue(self.folder, *jobs)

    def refuses(self, text: str) -> None:
        (self.folder / "refuse").write_text(f"{text}\n")


MICRO = "training.micro_batch_size=1"
# No data, no tokenizer: nothing but the model.
FIELDS = ("megatron.mock_data=true", "logging.eval_iters=1", MICRO)
LAYOUT = ("--nodes=2", "--nproc-per-node=2")


def submit_demo(*words: str, fields: tuple[str, ...] = (), layout: tuple[str, ...] = LAYOUT) -> int:
    """The exit code."""
    return main(["submit", "demo_cpu", *layout, *(f"--set={text}" for text in (*FIELDS, *fields)), *words])


def assert_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str], code: int, *reasons: str) -> None:
    """With one clear line, before anything was queued or written."""
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    for reason in reasons:
        assert reason in captured.err
    assert cluster.queued == [] and cluster.cancelled == []
    assert list(Path.cwd().iterdir()) == []
