"""The record of a submission in submission.json: the request, its folder, and the version of the code."""

import datetime
import os
from pathlib import Path

from megatron_txssm import __version__
from megatron_txssm.jobs.submission.allocation import Allocation
from megatron_txssm.jobs.submission.request import Request
from megatron_txssm.slurm.submission import SubmissionRecord


def make_record(
    command: str, request: Request, allocation: Allocation, commit: str | None, home: Path
) -> SubmissionRecord:
    """The record without job numbers. `command`: submits it again; `home`: folder of the code that the jobs run."""
    return {
        "command": _utf8(command),
        "recipe": _utf8(request.recipe),
        "overrides": list(request.overrides),
        "submitted": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "directory": _utf8(os.getcwd()),
        "version": __version__,
        "git_commit": commit,
        # The checkout, the run's frozen copy, or an installed package's HOME.
        "code": str(home),
        "nodes": allocation.nodes,
        "spare_nodes": allocation.spare,
        "nproc_per_node": allocation.nproc_per_node,
        "gpus_per_node": allocation.gpus_per_node,
    }


def _utf8(text: str) -> str:
    """The text with undecodable bytes, which a command line or a path may contain, replaced."""
    return os.fsencode(text).decode(errors="replace")
