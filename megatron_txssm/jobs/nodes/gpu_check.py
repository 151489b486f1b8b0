"""Checks a node's GPUs before training: errors, remapped rows of memory, leftover processes.

Uses only the standard library and nvidia-smi, like node_check.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Reported by GPUs that lack a counter; any other text means that the GPU is lost or hung.
_NOT_COUNTED = ("[N/A]", "N/A", "[Not Supported]", "[Not Found]", "[Insufficient Permissions]")
# Xid numbers of NVIDIA's catalogue that indicate a fault of the GPU, not of a program: double-bit error, failed row
# remapping, NVLink, fallen off the bus, uncontained error, GPU system processor (two numbers), unrecovered error.
BAD_XIDS = (48, 64, 74, 79, 95, 119, 120, 140)
_XID = re.compile(r"^\[\s*(\d+)\.\d+\].*NVRM: Xid \(PCI:([0-9a-fA-F:]+)[^)]*\): (\d+)", re.MULTILINE)
XID_SECONDS = 3600


@dataclass(frozen=True)
class Gpu:
    """A row of nvidia-smi's output, as text."""

    index: str
    uuid: str
    # Such as 00000000:3B:00.0.
    bus: str
    uncorrected_errors: str
    used_mb: str


def limit(name: str, default: float | None, warnings: list[str]) -> float | None:
    """The site's limit TXSSM_PREFLIGHT_`name`, or the default; None turns the check off."""
    text = os.environ.get(f"TXSSM_PREFLIGHT_{name}", "")
    if text in ("", "off"):
        return None if text else default
    try:
        return float(text)
    except ValueError:
        warnings.append(f"TXSSM_PREFLIGHT_{name}={text} is neither a number nor off: using the default")
        return default


def check_gpus(wanted: int, problems: list[str], warnings: list[str]) -> None:
    """Check the `wanted` GPUs that Slurm gave the job on this node; adds to `problems` and `warnings`."""
    if not wanted:
        warnings.append("no GPU was requested: not checked")
        return
    try:
        rows = _ask("gpu", "index,uuid,pci.bus_id,ecc.errors.uncorrected.volatile.total,memory.used")
    except (OSError, subprocess.SubprocessError) as error:
        problems.append(f"{wanted} GPUs were requested, but nvidia-smi fails: {error}")
        return
    found = [Gpu(*row) for row in rows if len(row) == 5]
    if len(found) < wanted:
        problems.append(f"{len(found)} of {wanted} GPUs respond")
    ours = _ours(found)
    for gpu in ours:
        if gpu.uncorrected_errors.isdecimal():
            if int(gpu.uncorrected_errors) > 0:
                problems.append(
                    f"GPU {gpu.index} has {gpu.uncorrected_errors} uncorrected memory errors; it needs a reset"
                )
        elif gpu.uncorrected_errors not in _NOT_COUNTED:
            problems.append(f"GPU {gpu.index} reports {gpu.uncorrected_errors}")
    _check_leftovers(ours, problems, warnings)
    _check_rows(ours, problems, warnings)
    _check_xids(ours, problems, warnings)


def _ask(what: str, fields: str) -> list[list[str]]:
    """Rows of fields; a message such as "No devices were found" has one field. OSError, SubprocessError."""
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return [[field.strip() for field in row.split(",")] for row in answer.splitlines()]


def _ours(gpus: list[Gpu]) -> list[Gpu]:
    """This job's GPUs: unless Slurm hides the others, nvidia-smi also shows those of other jobs."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    ours = [gpu for gpu in gpus if gpu.index in visible or gpu.uuid in visible]
    return ours if len(ours) == len(visible) > 0 else gpus


def _check_leftovers(gpus: list[Gpu], problems: list[str], warnings: list[str]) -> None:
    # The driver and its daemons use less.
    most = limit("GPU_MEMORY_MB", 2000, warnings)
    for gpu in gpus:
        if most is not None and gpu.used_mb.isdecimal() and int(gpu.used_mb) > most:
            problems.append(
                f"GPU {gpu.index} has {gpu.used_mb} MB of memory in use before the run (limit {most:g}: "
                "TXSSM_PREFLIGHT_GPU_MEMORY_MB); by a leftover process"
            )


def _check_rows(gpus: list[Gpu], problems: list[str], warnings: list[str]) -> None:
    # The number of spare rows of a GPU.
    most = limit("REMAPPED_ROWS", 512, warnings)
    if most is None:
        return
    try:
        fields = "uncorrectable,remapped_rows.pending,remapped_rows.failure"
        rows = {row[0]: row[1:] for row in _ask("remapped-rows", f"gpu_uuid,remapped_rows.{fields}") if len(row) == 4}
    except (OSError, subprocess.SubprocessError) as error:
        warnings.append(f"remapped rows of GPU memory are not checked: nvidia-smi fails: {error}")
        return
    for gpu in gpus:
        count, pending, failure = rows.get(gpu.uuid, ("N/A",) * 3)
        if _is_yes(failure):
            problems.append(f"GPU {gpu.index} could not remap a bad row of its memory; it must be replaced")
        elif _is_yes(pending):
            problems.append(f"GPU {gpu.index} has a bad row of memory to remap; it needs a reset")
        if count.isdecimal() and int(count) > most:
            problems.append(
                f"GPU {gpu.index} has remapped {count} bad rows of memory (limit {most:g}: "
                "TXSSM_PREFLIGHT_REMAPPED_ROWS)"
            )


def _is_yes(word: str) -> bool:
    """Whether a flag is set: drivers write Yes and No, or a number."""
    return word not in (*_NOT_COUNTED, "No", "0")


def _check_xids(gpus: list[Gpu], problems: list[str], warnings: list[str]) -> None:
    most = limit("XIDS", 0, warnings)
    if most is None:
        return
    try:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=60, check=True).stdout
        now = _uptime_seconds()
    except (OSError, ValueError, subprocess.SubprocessError):
        warnings.append("Xid errors of GPUs are not checked: the kernel's log (dmesg) cannot be read")
        return
    buses = {_slot(gpu.bus) for gpu in gpus}
    found = [
        (bus.lower(), int(number))
        for second, bus, number in _XID.findall(log)
        if int(number) in BAD_XIDS and now - int(second) < XID_SECONDS and (_slot(bus) in buses or not buses)
    ]
    if len(found) > most:
        said = ", ".join(sorted({f"Xid {number} of {bus}" for bus, number in found}))
        problems.append(
            f"GPUs had {len(found)} hardware errors in the last hour (limit {most:g}: TXSSM_PREFLIGHT_XIDS): {said}"
        )


def _uptime_seconds() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def _slot(bus: str) -> str:
    """0000:3b:00 for both 00000000:3B:00.0 and 0000:3b:00."""
    return bus.lower().partition(".")[0][-10:]
