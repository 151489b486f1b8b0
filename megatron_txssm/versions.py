"""Versions of the packages that decide what a run computes, and the commit of the code."""

import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path

# Their versions must agree across a job's nodes.
PACKAGES = ("megatron-core", "torch", "triton", "transformer-engine", "mamba-ssm", "causal-conv1d", "numpy")


def package_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """By package; "none" for one that is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def git_commit(home: Path) -> str | None:
    """The commit of the code in `home`, with `+changes` if it has uncommitted ones; None outside a checkout."""
    git = ["git", "-C", str(home)]
    try:
        # A package installed into an environment may lie in another project's repository.
        subprocess.run([*git, "ls-files", "--error-unmatch", "megatron_txssm"], check=True, capture_output=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes.strip() else commit
