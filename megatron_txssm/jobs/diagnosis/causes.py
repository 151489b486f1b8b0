"""The causes of an attempt's end: what each means, what to do about it, and the words by which a rank tells it."""

import re

# Cause -> (what happened, what to do about it).
CAUSES: dict[str, tuple[str, str]] = {
    "finished": ("the run is finished", ""),
    "time_limit": ("the time limit came near", "nothing: the job goes on; raise --time if it does so too often"),
    "time_limit_hit": ("the time limit was hit before the run was saved", "raise --stop-before: saving takes longer"),
    "preempted": (
        "the job was preempted",
        "nothing: it starts again when the nodes are free",
    ),
    "node_failure": ("a node was lost", "nothing: Slurm starts it again on other nodes"),
    "requeued": ("somebody requeued the job", "nothing: it starts again by itself"),
    "cancelled": ("somebody cancelled the job", "submit it again to go on from its checkpoint"),
    "step_cancelled": ("somebody cancelled the trainer's step", "submit it again to go on, unless it was requeued"),
    "stopped": ("the trainer was told to save and stop", "submit it again to go on, unless it was requeued"),
    "megatron_exit": (
        "megatron.exit_interval or megatron.exit_duration_in_mins ended the trainer",
        "submit it again to go on from its checkpoint",
    ),
    "hung": (
        "the trainer hung",
        "look at the stacks in the ranks' logs; if it is only slow, raise --start-, --step- or --save-timeout",
    ),
    "preflight": ("a node is not fit to train", "mend the node, or leave it out: --sbatch exclude=NODE"),
    "refused": ("the recipe cannot run", "mend what the message names"),
    "disk_full": ("the disk or the quota is full", "make room where the message says; then it can go on"),
    "nan": (
        "the loss, a gradient or a weight became NaN or infinite",
        "lower optimizer.learning_rate, or go back to an older checkpoint; a GPU may also compute it wrongly",
    ),
    "bad_gpu": (
        "a GPU is not sound",
        "leave its node out (--sbatch exclude=NODE), and have the GPU tested: dcgmi diag -r 3, dmesg | grep -i xid",
    ),
    "node_file_system": (
        "a file system failed on one node",
        "mend it there (mount, df /dev/shm), or leave the node out: --sbatch exclude=NODE",
    ),
    "out_of_memory": (
        "a rank ran out of memory",
        "lower training.micro_batch_size, or set parallel.recompute=full; for the host's memory, --sbatch mem=0",
    ),
    "killed": ("a rank was killed by a signal", "look at its log and at the node's system log"),
    "supervisor_killed": (
        "the supervisor was killed, on the job's first node",
        "look at that node's system log; where its memory ran out, ask for all of it: --sbatch mem=0",
    ),
    "srun_killed": (
        "srun, which runs the trainer's step, was killed on the job's first node",
        "look at that node's system log; where its memory ran out, ask for all of it: --sbatch mem=0",
    ),
    "failed": ("a rank failed", "read its log; the same step failing twice is no accident"),
    "connection_lost": (
        "the ranks lost each other, and none of them says why",
        "look at the node and its network; leave it out if it happens again: --sbatch exclude=NODE",
    ),
    "unknown": (
        "the batch script ended, and nothing says why",
        "look at the job's output and the system log of the node it ran on, the first",
    ),
}
# What a signal usually means; SIGKILL is also how Linux frees memory.
_SIGNAL_REMEDIES = {
    "SIGKILL": "look at the node's system log; memory is the usual reason: --sbatch mem=0 asks for all of the host's",
    "SIGBUS": "look whether /dev/shm or the node's disk is full, or a mapped file is gone; then read its log",
    "SIGSEGV": "read its log: native code failed; if it is always the same node, leave it out: --sbatch exclude=NODE",
    "SIGABRT": "read its log: a library gave up, and says there why",
    "SIGFPE": "read its log: native code failed",
}
_QUOTA = re.compile(r"Disk quota exceeded|EDQUOT|\[Errno 122\]")
_QUOTA_REMEDY = (
    "free space within your quota (quota -s, or lfs quota -hu $USER FOLDER), or have it raised; then it can go on"
)

# The cause that a rank's last words tell, the certain ones first. CUDA's and the kernel's words are theirs.
_WORDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "bad_gpu",
        re.compile(
            r"uncorrectable (?:ECC|NVLink) error|cudaErrorECCUncorrectable|cudaErrorNvlinkUncorrectable"
            r"|NVLink error|peer GPU memory over nvlink|hardware stack error|unspecified launch failure"
            r"|GPU is lost|fallen off the bus|fell off the bus|\bXid\b.{0,40}: (?:48|63|64|74|79|92|94|95|119|120)\b"
            r"|system not yet initialized|device\(s\) is/are busy or unavailable|no CUDA-capable device is detected",
            re.IGNORECASE,
        ),
    ),
    # Memory of a node, which leftovers fill.
    ("node_file_system", re.compile(r"/dev/shm.*No space left on device|No space left on device.*/dev/shm")),
    ("disk_full", re.compile(r"No space left on device|ENOSPC|\[Errno 28\]|" + _QUOTA.pattern)),
    (
        "node_file_system",
        # Those of the second line are a network connection's words, too: a file's error names the file.
        re.compile(
            r"Read-only file system|Stale (?:NFS )?file handle|Input/output error|Remote I/O error"
            r"|\[Errno (?:107|108|19|6|112)\] [^:'\"]+: ['\"]/"
        ),
    ),
    # Computed again, it is finite.
    ("bad_gpu", re.compile(r"^FloatingPointError\b.*came out differently")),
    # Earlier versions raise a RuntimeError.
    ("nan", re.compile(r"^FloatingPointError\b|is NaN or infinite")),
    (
        "out_of_memory",
        re.compile(r"out of memory|OutOfMemoryError|^MemoryError\b|Cannot allocate memory", re.IGNORECASE),
    ),
)
# What a rank says when another one has gone.
_CONNECTION = re.compile(
    r"gloo|NCCL|connection|Broken pipe|ProcessGroup|Watchdog|TCPStore|Dist(?:Network|Store)Error", re.IGNORECASE
)


def cause_of(text: str) -> str | None:
    """The cause that an error's text tells, such as "OSError: [Errno 28] No space left on device"; None for another."""
    return next((cause for cause, words in _WORDS if words.search(text)), None)


def is_of_another_rank(text: str) -> bool:
    """Whether an error only says that another rank has gone. NCCL's own want of memory does not."""
    return cause_of(text) is None and _CONNECTION.search(text) is not None


def suspect(text: str) -> tuple[int, str] | None:
    """The first rank and node that a not-finite result names as its origin: all ranks end with the same words."""
    found = (
        re.search(r"\bon rank (\d{1,9}) \(node ([^\s,:)]+)", text) if text.startswith("FloatingPointError") else None
    )
    return (int(found[1]), found[2]) if found else None


def remedy(cause: str, detail: str) -> str:
    """What to do about a cause, as far as its own words tell."""
    if cause == "disk_full" and _QUOTA.search(detail):
        return _QUOTA_REMEDY
    if cause == "killed":
        return next((text for name, text in _SIGNAL_REMEDIES.items() if name in detail), CAUSES[cause][1])
    return meaning(cause)[1]


def meaning(cause: str) -> tuple[str, str]:
    """What happened, what to do about it; of a cause that only a later version knows, its name."""
    return CAUSES.get(cause, (cause.replace("_", " "), "read the job's output"))


def shortened(text: str, limit: int = 4000) -> str:
    """One line; of a very long text the begin and the end, where the remedy is."""
    text = " ".join(text.split())
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]} … {text[-half:]}"
