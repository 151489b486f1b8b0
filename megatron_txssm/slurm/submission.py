"""RUN/submission.json: the last submission of a run by `txssm submit`."""

from pathlib import Path
from typing import TypedDict, cast

from megatron_txssm.errors import UserError
from megatron_txssm.typed_json import misfit, read_json


class SubmissionRecord(TypedDict, total=False):
    """The contents of submission.json; other versions may not write all fields."""

    # The command that submits the run again, and the folder to run it in.
    command: str
    directory: str
    # As given to `submit`.
    recipe: str
    overrides: list[str]
    # ISO 8601 with the time zone.
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
    # Stage -> job numbers.
    jobs: dict[str, list[str]]


def read_submission(run: Path) -> SubmissionRecord:
    """The contents of submission.json; empty if the run was not submitted by `txssm submit`."""
    path = run / "submission.json"
    try:
        found = read_json(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); remove it to continue without it") from None
    wrong = misfit(found, SubmissionRecord, "it")
    if wrong is None and not all(found.get("jobs", {"": "1"}).values()):
        wrong = "a stage without a job"
    if wrong is not None:
        raise UserError(f"{path} is not what txssm submit writes ({wrong}); remove it to continue without it")
    return cast(SubmissionRecord, found)
