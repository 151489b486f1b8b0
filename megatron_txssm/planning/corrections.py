"""What a machine's measured step differs by from the formulas, as `txssm plan --calibrate` writes it to a file."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_txssm.architecture.gpus import Gpu
from megatron_txssm.errors import UserError
from megatron_txssm.files import write_json

VERSION = 1


@dataclass(frozen=True)
class Link:
    """A collective's measured seconds: `latency`, and its bytes as a ring sends them at `bandwidth` a second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Line:
    """Measured seconds: `fixed`, and `factor` times those by formula."""

    factor: float = 1.0
    fixed: float = 0.0

    def at(self, predicted: float) -> float:
        return self.fixed + self.factor * predicted


@dataclass(frozen=True)
class Corrections:
    """How measured seconds follow from predicted ones; those of a machine that was not measured are equal.

    Attributes:
        passes: layer symbol, or "head" -> its forward and its backward pass
        optimizer: factor of the optimizer's seconds
        micro_batch: seconds of a micro-batch outside of layers and LM head
        step: seconds of a step outside of micro-batches, collectives and optimizer
        links: collective -> its link within a node
        alone: how much faster a process computes while all others wait: 1, but for processes that share a core
    """

    passes: Mapping[str, tuple[Line, Line]] = field(default_factory=dict)
    optimizer: float = 1.0
    micro_batch: float = 0.0
    step: float = 0.0
    links: Mapping[str, Link] = field(default_factory=dict)
    alone: float = 1.0

    def corrected(self, part: str, forward: float, backward: float) -> tuple[float, float]:
        """Seconds of a layer's or the head's kernels."""
        of_forward, of_backward = self.passes.get(part, (Line(), Line()))
        return of_forward.at(forward), of_backward.at(backward)

    def waiting(self, processes: int) -> float:
        """What waiting costs: 1, or 0 for processes that share a core, of which the others get a waiting one's part."""
        return (processes / min(self.alone, processes) - 1) / (processes - 1) if processes > 1 else 1.0


UNCHANGED = Corrections()


@dataclass(frozen=True)
class Calibration:
    """A measured machine.

    Attributes:
        measured: what was measured, in words
    """

    gpu: Gpu
    measured: str
    corrections: Corrections

    def write(self, file: Path) -> None:
        write_json(file, {"version": VERSION, **dataclasses.asdict(self)})


def read_calibration(file: Path) -> Calibration:
    """UserError if the file is not one that `Calibration.write` wrote."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise UserError(f"--rates {file}: version {found['version']}, not {VERSION}; make it again by --calibrate")
        gpu = Gpu(**found["gpu"] | {"capability": tuple(found["gpu"]["capability"])})
        return Calibration(gpu, found["measured"], _corrections(found["corrections"]))
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--rates {file} is not a file made by `txssm plan --calibrate`: {error!r}") from error


def _corrections(found: dict[str, Any]) -> Corrections:
    passes = {part: (Line(**forward), Line(**backward)) for part, (forward, backward) in found["passes"].items()}
    links = {collective: Link(**link) for collective, link in found["links"].items()}
    return Corrections(**{**found, "passes": passes, "links": links})
