"""Shared by the verbs of this package: run in one process, clean up when stopped, return an exit code."""

import os
import sys
from collections.abc import Callable
from functools import wraps

from megatron_txssm.convert.proof.proof import NotTheSame
from megatron_txssm.convert.proof.worker import TaskFailed
from megatron_txssm.errors import readable
from megatron_txssm.files import unwound_by_signals
from megatron_txssm.slurm.environment import adopt_slurm_step


def conversion[**P](verb: Callable[P, int]) -> Callable[P, int]:
    """A verb that also returns 1 if the proof fails and 3 if a task does, each with a message on stderr.

    Of several tasks of a Slurm step, or of torchrun's processes, only the first runs it; the others return 0.
    """

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        adopt_slurm_step()
        if os.environ.get("RANK", "0") != "0":
            return 0
        try:
            with unwound_by_signals():
                return verb(*args, **kwargs)
        except NotTheSame as error:
            print(
                f"error: the conversion does not give the same model, and nothing was written:\n{error}\nTo look at "
                "it: convert with --no-verify, then `txssm convert verify`",
                file=sys.stderr,
            )
            return 1
        except TaskFailed as error:
            print(readable(f"error: {error}"), file=sys.stderr)
            return 3

    return run
