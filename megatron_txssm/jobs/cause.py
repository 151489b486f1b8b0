"""Names of the causes of an attempt's end; diagnosis/causes.py holds their meanings."""

from enum import StrEnum, auto

from megatron_txssm.slurm.words import EndedBySlurm


class Cause(StrEnum):
    """Why an attempt ended; attempt.json stores the value."""

    FINISHED = auto()
    TIME_LIMIT = auto()
    TIME_LIMIT_HIT = EndedBySlurm.TIME_LIMIT_HIT
    PREEMPTED = EndedBySlurm.PREEMPTED
    NODE_FAILURE = EndedBySlurm.NODE_FAILURE
    REQUEUED = EndedBySlurm.REQUEUED
    CANCELLED = auto()
    STEP_CANCELLED = auto()
    STOPPED = auto()
    MEGATRON_EXIT = auto()
    HUNG = auto()
    PREFLIGHT = auto()
    REFUSED = auto()
    DISK_FULL = auto()
    NAN = auto()
    REWIND = auto()
    DIVERGED = auto()
    BAD_GPU = auto()
    NODE_FILE_SYSTEM = auto()
    OUT_OF_MEMORY = auto()
    KILLED = auto()
    SUPERVISOR_KILLED = auto()
    SRUN_KILLED = auto()
    FAILED = auto()
    CONNECTION_LOST = auto()
    UNKNOWN = auto()

    @classmethod
    def read(cls, text: str) -> "Cause | str":
        """The cause stored in attempt.json; the text itself if only a later version knows it."""
        try:
            return cls(text)
        except ValueError:
            return text
