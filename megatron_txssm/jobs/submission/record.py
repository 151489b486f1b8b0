"""The record of a submission in submission.json: the request, its folder, and the version of the code."""

import datetime
import os
import subprocess
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


def git_commit(home: Path) -> str | None:
    """The commit of the submitted code, with `+changes` if it has uncommitted ones; None outside a checkout."""
    git = ["git", "-C", str(home)]
    try:
        # A package installed into an environment may lie in another project's repository.
        subprocess.run([*git, "ls-files", "--error-unmatch", "megatron_txssm"], check=True, capture_output=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes.strip() else commit


def _utf8(text: str) -> str:
    """The text with undecodable bytes, which a command line or a path may contain, replaced."""
    return os.fsencode(text).decode(errors="replace")
