"""What metrics.jsonl records at each start about machine, code and versions; `txssm report` shows it."""

import os
import socket
import sys

import torch

from megatron_txssm import __version__
from megatron_txssm.home import HOME
from megatron_txssm.versions import git_commit, package_versions


def environment() -> dict[str, str]:
    """Name -> value, of this process; what is not installed or not known is left out."""
    found = {
        "host": socket.gethostname(),
        "nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "device": torch.cuda.get_device_name(),
        "megatron_txssm": __version__,
        "commit": git_commit(HOME),
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        **{name: version for name, version in package_versions().items() if version != "none"},
    }
    return {name: value for name, value in found.items() if value}
