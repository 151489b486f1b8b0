"""The causes of an attempt's end: their meanings, remedies, and the error texts that reveal them."""

import re
from typing import NamedTuple

from megatron_txssm.jobs.cause import Cause
from megatron_txssm.training.guard.spikes import DIVERGED, REWIND


class Meaning(NamedTuple):
    """A cause, explained for people."""

    # What happened.
    summary: str
    # What to do, if that depends only on the cause; may be empty.
    remedy: str


CAUSES: dict[Cause, Meaning] = {
    Cause.FINISHED: Meaning("the run is finished", ""),
    Cause.TIME_LIMIT: Meaning(
        "the time limit was near", "nothing: the job continues; raise --time if this happens too often"
    ),
    Cause.TIME_LIMIT_HIT: Meaning(
        "the time limit was hit before the run was saved", "raise --stop-before: saving takes longer"
    ),
    Cause.PREEMPTED: Meaning(
        "the job was preempted",
        "nothing: it restarts when nodes are free",
    ),
    Cause.NODE_FAILURE: Meaning("a node was lost", "nothing: Slurm restarts it on other nodes"),
    Cause.REQUEUED: Meaning("somebody requeued the job", "nothing: it restarts by itself"),
    Cause.CANCELLED: Meaning("somebody cancelled the job", "submit it again to continue from its checkpoint"),
    Cause.STEP_CANCELLED: Meaning(
        "somebody cancelled the trainer's step", "submit it again to continue, unless it was requeued"
    ),
    Cause.STOPPED: Meaning(
        "the trainer was told to save and stop", "submit it again to continue, unless it was requeued"
    ),
    Cause.MEGATRON_EXIT: Meaning(
        "megatron.exit_interval or megatron.exit_duration_in_mins ended the trainer",
        "submit it again to continue from its checkpoint",
    ),
    Cause.HUNG: Meaning(
        "the trainer hung",
        "see the stacks in the ranks' logs; if it is only slow, raise --start-, --step- or --save-timeout",
    ),
    Cause.PREFLIGHT: Meaning("a node failed the preflight", "repair the node, or exclude it: --sbatch exclude=NODE"),
    Cause.REFUSED: Meaning("the recipe cannot run", "correct what the message names"),
    Cause.DISK_FULL: Meaning(
        "the disk or the quota is full", "make room where the message says; then the run can continue"
    ),
    Cause.NAN: Meaning(
        "the loss, a gradient or a weight became NaN or infinite",
        "lower optimizer.learning_rate, or go back to an older checkpoint; a faulty GPU may also be the cause",
    ),
    Cause.REWIND: Meaning("the spike guard went back to a checkpoint", "nothing: the run continues from there"),
    Cause.DIVERGED: Meaning(
        "the loss or the gradient norm spiked too often",
        "lower optimizer.learning_rate, or look at the documents of the spikes; guard.max_spikes is the limit",
    ),
    Cause.BAD_GPU: Meaning(
        "a GPU is faulty",
        "exclude its node (--sbatch exclude=NODE), and have the GPU tested: dcgmi diag -r 3, dmesg | grep -i xid",
    ),
    Cause.NODE_FILE_SYSTEM: Meaning(
        "a file system failed on one node",
        "repair it there (mount, df /dev/shm), or exclude the node: --sbatch exclude=NODE",
    ),
    Cause.OUT_OF_MEMORY: Meaning(
        "a rank ran out of memory",
        "lower training.micro_batch_size, or set parallel.recompute=full; for the host's memory, --sbatch mem=0",
    ),
    Cause.KILLED: Meaning("a rank was killed by a signal", "read its log and the node's system log"),
    Cause.SUPERVISOR_KILLED: Meaning(
        "the supervisor was killed, on the job's first node",
        "read that node's system log; if its memory ran out, request all of it: --sbatch mem=0",
    ),
    Cause.SRUN_KILLED: Meaning(
        "srun, which runs the trainer's step, was killed on the job's first node",
        "read that node's system log; if its memory ran out, request all of it: --sbatch mem=0",
    ),
    Cause.FAILED: Meaning("a rank failed", "read its log; if the same step fails twice, it is not a fluke"),
    Cause.CONNECTION_LOST: Meaning(
        "the ranks lost their connections, and none reported the cause",
        "check the node and its network; exclude it if this happens again: --sbatch exclude=NODE",
    ),
    Cause.UNKNOWN: Meaning(
        "the batch script ended for an unknown reason",
        "read the job's output and the system log of the job's first node",
    ),
}
# What a signal usually means; Linux also sends SIGKILL when memory runs out.
_SIGNAL_REMEDIES = {
    "SIGKILL": "read the node's system log; memory is the usual reason: --sbatch mem=0 requests it all",
    "SIGBUS": "check whether /dev/shm or the node's disk is full, or a mapped file is gone; then read its log",
    "SIGSEGV": "read its log: native code failed; if it is always the same node, exclude it: --sbatch exclude=NODE",
    "SIGABRT": "read its log: a library aborted, and its reason is there",
    "SIGFPE": "read its log: native code failed",
}
_QUOTA = re.compile(r"Disk quota exceeded|EDQUOT|\[Errno 122\]")
_QUOTA_REMEDY = (
    "free space within your quota (quota -s, or lfs quota -hu $USER FOLDER), or have it raised; then it can continue"
)

# Causes by a rank's last error, the certain ones first. The texts of CUDA and the kernel are quoted.
_WORDS: tuple[tuple[Cause, re.Pattern[str]], ...] = (
    (
        Cause.BAD_GPU,
        re.compile(
            r"uncorrectable (?:ECC|NVLink) error|cudaErrorECCUncorrectable|cudaErrorNvlinkUncorrectable"
            r"|NVLink error|peer GPU memory over nvlink|hardware stack error|unspecified launch failure"
            r"|GPU is lost|fallen off the bus|fell off the bus|\bXid\b.{0,40}: (?:48|63|64|74|79|92|94|95|119|120)\b"
            r"|system not yet initialized|device\(s\) is/are busy or unavailable|no CUDA-capable device is detected",
            re.IGNORECASE,
        ),
    ),
    # The node's memory, filled by leftover files.
    (Cause.NODE_FILE_SYSTEM, re.compile(r"/dev/shm.*No space left on device|No space left on device.*/dev/shm")),
    (Cause.DISK_FULL, re.compile(r"No space left on device|ENOSPC|\[Errno 28\]|" + _QUOTA.pattern)),
    (
        Cause.NODE_FILE_SYSTEM,
        # Network connections report the numbers in the second line, too; a file's error names the file.
        re.compile(
            r"Read-only file system|Stale (?:NFS )?file handle|Input/output error|Remote I/O error"
            r"|\[Errno (?:107|108|19|6|112)\] [^:'\"]+: ['\"]/"
        ),
    ),
    (Cause.REWIND, re.compile(rf"^{REWIND}\b")),
    (Cause.DIVERGED, re.compile(rf"^{DIVERGED}\b")),
    # Finite when computed again: the GPU is at fault.
    (Cause.BAD_GPU, re.compile(r"^FloatingPointError\b.*came out differently")),
    # Earlier versions raise a RuntimeError.
    (Cause.NAN, re.compile(r"^FloatingPointError\b|is NaN or infinite")),
    (
        Cause.OUT_OF_MEMORY,
        re.compile(r"out of memory|OutOfMemoryError|^MemoryError\b|Cannot allocate memory", re.IGNORECASE),
    ),
)
# What a rank reports when another one has died.
_CONNECTION = re.compile(
    r"gloo|NCCL|connection|Broken pipe|ProcessGroup|Watchdog|TCPStore|Dist(?:Network|Store)Error", re.IGNORECASE
)


def cause_of(text: str) -> Cause | None:
    """The cause of an error by its text, such as "OSError: [Errno 28] No space left on device"; None if unknown."""
    return next((cause for cause, words in _WORDS if words.search(text)), None)


def is_of_another_rank(text: str) -> bool:
    """Whether an error only reports that another rank has died; NCCL's own lack of memory does not."""
    return cause_of(text) is None and _CONNECTION.search(text) is not None


def suspect(text: str) -> tuple[int, str] | None:
    """The first rank and node that a non-finite result's error names as its origin: all ranks raise the same error."""
    found = (
        re.search(r"\bon rank (\d{1,9}) \(node ([^\s,:)]+)", text) if text.startswith("FloatingPointError") else None
    )
    return (int(found[1]), found[2]) if found else None


def remedy(cause: Cause | str, detail: str) -> str:
    """What to do about a cause, given its detail."""
    if cause == Cause.DISK_FULL and _QUOTA.search(detail):
        return _QUOTA_REMEDY
    if cause == Cause.KILLED:
        return next((text for name, text in _SIGNAL_REMEDIES.items() if name in detail), CAUSES[Cause.KILLED].remedy)
    return meaning(cause).remedy


def meaning(cause: Cause | str) -> Meaning:
    """The meaning of a cause; if only a later version knows it, its name."""
    known = Cause.read(cause)
    return CAUSES[known] if isinstance(known, Cause) else Meaning(known.replace("_", " "), "read the job's output")


def shortened(text: str, limit: int = 4000) -> str:
    """The text on one line; if it is very long, its beginning and its end, where the remedy is."""
    text = " ".join(text.split())
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]} … {text[-half:]}"
