"""txssm check gpu: does this node's installation compute right, and how fast is it?"""

import argparse
import shutil
import time
from collections.abc import Sequence

from megatron_txssm.check.gpu.bench import Bench
from megatron_txssm.check.gpu.findings import BAD, Finding, show, write
from megatron_txssm.check.gpu.parts import PARTS, Part
from megatron_txssm.check.parity import DIFFERENT
from megatron_txssm.errors import UserError


def check(args: argparse.Namespace) -> int:
    """The verb; returns the exit code."""
    wanted = _wanted(args.only)
    _require_device(args.device)
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: no file can be made there; name one in a folder that exists")
    begin = time.monotonic()
    findings: dict[str, Sequence[Finding]] = {}
    seconds: dict[str, float] = {}
    with Bench(args.device, args.small, begin + args.budget) as bench:
        for part in wanted:
            began = time.monotonic()
            findings[part.name] = _found(part, bench)
            seconds[part.name] = time.monotonic() - began
            show(part.name, findings[part.name], seconds[part.name])
            write(findings, seconds, args.out)
    all_of_them = [finding for of_part in findings.values() for finding in of_part]
    bad = [finding.claim for finding in all_of_them if finding.verdict in BAD]
    left_out = sum(finding.verdict == "left out" for finding in all_of_them)
    print(f"\n{args.out}: all figures; {time.monotonic() - begin:.0f} s")
    if bad:
        print(f"NOT right: {'; '.join(bad)}\nlogs: {bench.folder}")
        return DIFFERENT
    shutil.rmtree(bench.folder)
    print(f"nothing wrong was found{f'; {left_out} left out' if left_out else ''}")
    return 0


def _wanted(names: str) -> Sequence[Part]:
    known = [part.name for part in PARTS]
    chosen = names.split(",") if names else known
    for name in chosen:
        if name not in known:
            raise UserError(f"--only {name} is no part of the check; its parts: {', '.join(known)}")
    # The first says what is installed, which the others ask.
    return [part for part in PARTS if part.name in chosen or part is PARTS[0]]


def _require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible here; run it on a GPU node, or try the check itself: --device cpu --small")


def _found(part: Part, bench: Bench) -> Sequence[Finding]:
    """What a part found; one that breaks does not end the others."""
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
