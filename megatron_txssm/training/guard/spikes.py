"""RUN/spikes.jsonl: the spikes of a run and what was done, one JSON object per line, kept over restarts and requeues.

A step that is done again after a restart may be written again: its last line counts.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_txssm.choices import SpikeAction
from megatron_txssm.files import flush
from megatron_txssm.metrics import end_last_line
from megatron_txssm.typed_json import parse_json, typed_fields

FILE = "spikes.jsonl"
# Names of the errors that end a worker: spike_guard.py raises them, and the launcher or supervisor reads them.
REWIND, DIVERGED = "Rewind", "Diverged"


@dataclass(frozen=True)
class Spike:
    """A step that was not trained on, and why. A loss or norm that is not finite, and its z-score, are None."""

    step: int
    # "stop": there had been too many.
    action: SpikeAction | Literal["stop"]
    loss: float | None
    loss_z_score: float | None
    grad_norm: float | None
    grad_norm_z_score: float | None
    world_size: int
    # Seconds since the epoch.
    time: float
    # Under "rewind": the first step that is jumped over (the last is `step`), and the checkpoint's step (0: none).
    jumped_from: int | None = None
    back_to: int | None = None

    @property
    def jumped(self) -> range:
        """The steps that are read, but not trained on, when they are done again."""
        return range(0) if self.jumped_from is None else range(self.jumped_from, self.step + 1)

    @property
    def outcome(self) -> str:
        """What was done."""
        if self.action == "rewind":
            there = f"to the checkpoint of step {self.back_to}" if self.back_to else "to the start"
            return f"went back {there} and jumped over steps {self.jumped_from} to {self.step}"
        return "not trained on" if self.action == "skip" else "ended the run as diverged"

    def __str__(self) -> str:
        loss, norm = _figure(self.loss, self.loss_z_score), _figure(self.grad_norm, self.grad_norm_z_score)
        return f"spike at step {self.step}: loss {loss}, gradient norm {norm}; {self.outcome}"


def _figure(value: float | None, z_score: float | None) -> str:
    return "NaN or infinite" if value is None or z_score is None else f"{value:.4g} (z-score {z_score:.1f})"


def record_spike(run: Path, spike: Spike) -> None:
    """Append it to the run's file, flushed to disk: a restart must know it."""
    end_last_line(run / FILE)
    with (run / FILE).open("ab") as file:
        file.write(f"{json.dumps(asdict(spike))}\n".encode())
        flush(file)
    # The file's entry in the folder, too.
    descriptor = os.open(run, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_spikes(run: Path) -> list[Spike]:
    """The run's spikes in order of steps, each once; a line truncated by a kill is left out."""
    if not (run / FILE).is_file():
        return []
    spikes = (_parsed(line) for line in (run / FILE).read_bytes().splitlines())
    last = {spike.step: spike for spike in spikes if spike is not None}
    return [last[step] for step in sorted(last)]


def _parsed(line: bytes) -> Spike | None:
    try:
        return Spike(**typed_fields(parse_json(line), Spike))
    except (ValueError, TypeError):
        return None
