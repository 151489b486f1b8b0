"""txssm check gpu: whether this node's installation computes correctly, and how fast."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_txssm.check.gpu.bench import Bench, Device
from megatron_txssm.check.gpu.findings import BAD, Finding, show, write
from megatron_txssm.check.gpu.parts import PARTS, Part
from megatron_txssm.check.parity import DIFFERENT
from megatron_txssm.errors import UserError, require_positive
from megatron_txssm.files import unwound_by_signals


@unwound_by_signals()
def check_gpu(
    *,
    budget: int = 600,
    parts: Sequence[str] = (),
    out: str | Path = "gpu-check.json",
    device: Device = "cuda",
    small: bool = False,
) -> int:
    """Check this node's installation, print the findings, and write all figures to `out`; returns the exit code.

    DIFFERENT if something is wrong. budget: seconds; a part that does not fit is left out. parts: names of PARTS; none:
    all. small: sizes for a machine without a GPU.
    """
    require_positive(budget=budget)
    out = Path(out)
    wanted = _wanted(parts)
    _require_device(device)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no file can be made there; name one in a folder that exists")
    begin = time.monotonic()
    findings: dict[str, Sequence[Finding]] = {}
    seconds: dict[str, float] = {}
    with Bench(device, small, begin + budget) as bench:
        for part in wanted:
            began = time.monotonic()
            findings[part.name] = _found(part, bench)
            seconds[part.name] = time.monotonic() - began
            show(part.name, findings[part.name], seconds[part.name])
            write(findings, seconds, out)
    all_of_them = [finding for of_part in findings.values() for finding in of_part]
    bad = [finding.claim for finding in all_of_them if finding.verdict in BAD]
    left_out = sum(finding.verdict == "left out" for finding in all_of_them)
    print(f"\n{out}: all figures; {time.monotonic() - begin:.0f} s")
    if bad:
        print(f"NOT correct: {'; '.join(bad)}\nlogs: {bench.folder}")
        return DIFFERENT
    shutil.rmtree(bench.folder)
    print(f"nothing wrong was found{f'; {left_out} left out' if left_out else ''}")
    return 0


def _wanted(names: Sequence[str]) -> Sequence[Part]:
    known = [part.name for part in PARTS]
    chosen = names or known
    for name in chosen:
        if name not in known:
            raise UserError(f"--only {name}: no such part; use some of {', '.join(known)}")
    # The first part finds out what is installed, which the others need.
    return [part for part in PARTS if part.name in chosen or part is PARTS[0]]


def _require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible here; run it on a GPU node, or try the check itself: --device cpu --small")


def _found(part: Part, bench: Bench) -> Sequence[Finding]:
    """A part's findings; an exception in it does not stop the other parts."""
    if bench.seconds_left < part.seconds:
        return [
            Finding(part.about, "left out", f"{bench.seconds_left:.0f} s left of --budget, it takes {part.seconds:.0f}")
        ]
    print(f"{part.name}: {part.about} ...", end="", flush=True)
    found: list[Finding] = []
    try:
        found.extend(part.find(bench))
    except Exception as error:
        found.append(Finding(part.about, "FAILED", f"{type(error).__name__}: {error}"[:300]))
    return found
