"""Findings of the parts of `txssm check gpu`, and their table and JSON file."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_txssm.errors import UserError
from megatron_txssm.terminal import print_table

# "left out": for lack of time or of a requirement; "FAILED": without a result.
Verdict = Literal["right", "WRONG", "measured", "left out", "FAILED"]
BAD: tuple[Verdict, ...] = ("WRONG", "FAILED")


@dataclass(frozen=True)
class Finding:
    """One line of the table; `data` has the numbers, for further computation."""

    claim: str
    verdict: Verdict
    said: str
    data: dict[str, Any] = field(default_factory=dict)


def compared(claim: str, error: float, bound: float, unit: str = "") -> Finding:
    """Right if the error is within the bound; a NaN is wrong."""
    verdict: Verdict = "right" if error <= bound else "WRONG"
    # JSON has no NaN.
    number = error if math.isfinite(error) else str(error)
    return Finding(claim, verdict, f"{error:.2g}{unit} (bound {bound:g})", {"error": number, "bound": bound})


def failed(claim: str, found: dict[str, Any], *, of: str | None = None) -> Finding | None:
    """The finding for a process without a result; see `Child.wait`."""
    name = f"{of}: " if of else ""
    if "refused" in found:
        return Finding(claim, "left out", name + found["refused"])
    return Finding(claim, "FAILED", name + found["error"]) if "error" in found else None


def write(findings: dict[str, Sequence[Finding]], seconds: dict[str, float], file: Path) -> None:
    """Write all findings so far as JSON, by part; UserError if that fails, for example on a full disk."""
    parts = {
        part: {"seconds": round(seconds[part], 1), "findings": [asdict(finding) for finding in of_part]}
        for part, of_part in findings.items()
    }
    try:
        file.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {file} cannot be written: {error.strerror}; name another file") from None


def show(part: str, findings: Sequence[Finding], seconds: float) -> None:
    print(f"\n{part} ({seconds:.0f} s)")
    print_table(("", "verdict", "found"), [(f.claim, f.verdict, f.said) for f in findings])
