"""RUN/submission.json: how `txssm submit` submitted a run last."""

import json
from pathlib import Path
from typing import TypedDict, cast

from megatron_txssm.errors import UserError


class SubmissionRecord(TypedDict, total=False):
    """Other versions may not write all of it."""

    # What to type to submit the run again, and in which folder.
    command: str
    directory: str
    # As it was given, with the fields that were changed.
    recipe: str
    overrides: list[str]
    # When, as ISO 8601 has it, with the time zone.
    submitted: str
    version: str
    # None outside a checkout.
    git_commit: str | None
    # The folder of the code that the jobs run.
    code: str
    nodes: int
    spare_nodes: int
    nproc_per_node: int
    gpus_per_node: int
    # Stage -> numbers of its jobs.
    jobs: dict[str, list[str]]


def read_submission(run: Path) -> SubmissionRecord:
    """submission.json; empty where the run was not submitted by `txssm submit`."""
    path = run / "submission.json"
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("jobs", {}), dict):
        raise UserError(f"{path} is not what txssm submit writes; remove it to go on without it")
    return cast(SubmissionRecord, found)
