"""What is made of nvidia-smi's and the kernel's words; stand-ins say them."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_txssm.jobs.nodes import gpu_check
from megatron_txssm.jobs.nodes.gpu_check import check_gpus

SMI = """\
#!/bin/bash
here=$(dirname "$0")
format="--format=csv,noheader,nounits"
case "$*" in
    "--query-gpu=index,uuid,pci.bus_id,ecc.errors.uncorrected.volatile.total,memory.used $format") file=gpus ;;
    "--query-remapped-rows=gpu_uuid,remapped_rows.uncorrectable,remapped_rows.pending,remapped_rows.failure $format")
        file=rows ;;
    *) exit 99 ;;
esac
cat "$here/$file"
exit "$(cat "$here/$file.code" 2> /dev/null || echo 0)"
"""
UPTIME = 1_000_000.0  # seconds
UUIDS = [f"GPU-{number}f2a8f1e-0000-0000-0000-000000000000" for number in range(4)]
BUSES = ["00000000:1A:00.0", "00000000:3B:00.0", "00000000:8A:00.0", "00000001:1A:00.0"]


def gpu_rows(ecc: tuple[str, ...] = ("0",) * 4, used: tuple[str, ...] = ("1", "4", "1", "537")) -> str:
    rows = zip(range(len(ecc)), UUIDS, BUSES, ecc, used, strict=False)
    return "".join(", ".join(map(str, row)) + "\n" for row in rows)


def remapped(*changed: str) -> str:
    rows = list(changed) + ["0, No, No"] * (4 - len(changed))
    return "".join(f"{uuid}, {row}\n" for uuid, row in zip(UUIDS, rows, strict=True))


@dataclass
class Node:
    """Its commands, and what is found of them."""

    folder: Path

    def says(self, name: str, text: str, code: int = 0) -> None:
        (self.folder / name).write_text(text)
        (self.folder / f"{name}.code").write_text(str(code))

    def log(self, *lines: tuple[int, str]) -> None:
        """(seconds ago, text) of the kernel's log."""
        text = "".join(f"[{UPTIME - ago:12.6f}] {line}\n" for ago, line in lines)
        (self.folder / "dmesg").write_text(f"#!/bin/sh\nprintf %s {shlex.quote(text)}\n")
        (self.folder / "dmesg").chmod(0o755)

    def found(self, wanted: int = 4) -> tuple[list[str], list[str]]:
        problems: list[str] = []
        warnings: list[str] = []
        check_gpus(wanted, problems, warnings)
        return problems, warnings


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Four GPUs that are fit."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_check, "_uptime_seconds", lambda: UPTIME)
    for name in list(os.environ):
        if name.startswith("TXSSM_PREFLIGHT_"):
            monkeypatch.delenv(name)
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    node = Node(tmp_path)
    node.says("gpus", gpu_rows())
    node.says("rows", remapped())
    node.log((100_000, "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  570.124.06"))
    return node


@pytest.mark.parametrize("ecc", ["0", "[N/A]", "[Not Supported]"])
def test_gpus_that_are_all_there(node: Node, ecc: str) -> None:
    node.says("gpus", gpu_rows((ecc,) * 4))
    assert node.found() == ([], [])


def test_no_gpu_was_asked_for(node: Node) -> None:
    node.says("gpus", "", code=9)
    assert node.found(0) == ([], ["no GPU was requested: not checked"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (gpu_rows(("0",) * 3), "3 of 4 GPUs respond"),
        ("", "0 of 4 GPUs respond"),
        ("No devices were found\n", "0 of 4 GPUs respond"),
        (gpu_rows(("0", "7", "0", "0")), "GPU 1 has 7 uncorrected memory errors; it needs a reset"),
        (gpu_rows(("0", "0", "[GPU is lost]", "0")), "GPU 2 reports [GPU is lost]"),
        (gpu_rows(("0", "0", "0", "[GPU requires reset]")), "GPU 3 reports [GPU requires reset]"),
    ],
)
def test_gpus_that_are_not_fit(node: Node, text: str, problem: str) -> None:
    node.says("gpus", text)
    assert node.found()[0] == [problem]


def test_nvidia_smi_fails(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node.says("gpus", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", code=9)
    (problem,) = node.found(2)[0]
    assert problem.startswith("2 GPUs were requested, but nvidia-smi fails") and "exit status 9" in problem
    monkeypatch.setenv("PATH", "/nowhere")
    (problem,) = node.found(2)[0]
    assert "nvidia-smi fails" in problem and "No such file" in problem


# --- What somebody left.


def test_memory_that_a_process_left_in_use(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.says("gpus", gpu_rows(used=("1", "41234", "1", "1")))
    (problem,) = node.found()[0]
    assert problem.startswith("GPU 1 has 41234 MB of memory in use before the run (limit 2000: TXSSM_PREFLIGHT_GPU_")
    monkeypatch.setenv("TXSSM_PREFLIGHT_GPU_MEMORY_MB", "50000")
    assert node.found() == ([], [])
    monkeypatch.setenv("TXSSM_PREFLIGHT_GPU_MEMORY_MB", "0")
    assert len(node.found()[0]) == 4
    monkeypatch.setenv("TXSSM_PREFLIGHT_GPU_MEMORY_MB", "off")
    assert node.found() == ([], [])


@pytest.mark.parametrize("visible", ["0,2", f"{UUIDS[0]},{UUIDS[2]}"])
def test_the_neighbours_gpus_are_theirs(node: Node, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    # Another job works on 1 and 3, on a cluster that does not hide them.
    node.says("gpus", gpu_rows(("0", "2", "0", "0"), ("1", "41234", "1", "60000")))
    node.says("rows", remapped("0, No, No", "9, Yes, Yes"))
    node.log((5, "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."))
    assert len(node.found(2)[0]) == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert node.found(2) == ([], [])


# --- Rows of memory.


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("1, Yes, No", "GPU 0 has a bad row of memory to remap; it needs a reset"),
        ("1, 1, 0", "GPU 0 has a bad row of memory to remap; it needs a reset"),
        ("8, No, Yes", "GPU 0 could not remap a bad row of its memory; it must be replaced"),
        ("8, 0, 1", "GPU 0 could not remap a bad row of its memory; it must be replaced"),
        ("[N/A], [N/A], [N/A]", None),
        ("12, 0, 0", None),
    ],
)
def test_rows_that_are_remapped(node: Node, row: str, problem: str | None) -> None:
    node.says("rows", remapped(row))
    assert node.found() == ([problem] if problem else [], [])


def test_the_sites_limit_of_remapped_rows(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.says("rows", remapped("12, No, No"))
    monkeypatch.setenv("TXSSM_PREFLIGHT_REMAPPED_ROWS", "8")
    assert node.found()[0] == ["GPU 0 has remapped 12 bad rows of memory (limit 8: TXSSM_PREFLIGHT_REMAPPED_ROWS)"]
    node.says("rows", remapped("12, Yes, Yes"))
    monkeypatch.setenv("TXSSM_PREFLIGHT_REMAPPED_ROWS", "off")
    assert node.found() == ([], [])


def test_a_driver_that_knows_no_rows(node: Node) -> None:
    node.says("rows", 'Field "remapped_rows.pending" is not a valid field to query.\n', code=2)
    problems, (warning,) = node.found()
    assert problems == [] and warning.startswith("remapped rows of GPU memory are not checked: nvidia-smi fails")


# --- Xid errors.


def test_hardware_errors_of_the_last_hour(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.log(
        (7200, "NVRM: Xid (PCI:0000:1a:00): 95, Uncontained ECC error. It was reset since."),
        (60, "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."),
        # Of the program that ran there.
        (30, "NVRM: Xid (PCI:0000:3b:00): 31, pid=79749, name=python, Ch 0000000a, intr 00000000. MMU Fault"),
        (9, "NVRM: Xid (PCI:0000:8A:00): 48, pid=1234, name=python, An uncorrectable double bit error"),
    )
    assert node.found()[0] == [
        "GPUs had 2 hardware errors in the last hour (limit 0: TXSSM_PREFLIGHT_XIDS): Xid 48 of 0000:8a:00, "
        "Xid 79 of 0000:3b:00"
    ]
    monkeypatch.setenv("TXSSM_PREFLIGHT_XIDS", "2")
    assert node.found() == ([], [])


def test_a_kernels_log_that_may_not_be_read(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (node.folder / "dmesg").write_text(
        "#!/bin/sh\necho 'dmesg: read kernel buffer failed: Operation not permitted'\nexit 1\n"
    )
    assert node.found() == ([], ["Xid errors of GPUs are not checked: the kernel's log (dmesg) cannot be read"])
    monkeypatch.setenv("TXSSM_PREFLIGHT_XIDS", "off")
    assert node.found() == ([], [])
