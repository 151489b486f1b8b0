"""RUN/submission.json: how `txssm submit` submitted a run last."""

import json
from pathlib import Path
from typing import Any

from megatron_txssm.errors import UserError


def read_submission(run: Path) -> dict[str, Any]:
    """submission.json; empty where the run was not submitted by `txssm submit`."""
    path = run / "submission.json"
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("jobs", {}), dict):
        raise UserError(f"{path} is not what txssm submit writes; remove it to go on without it")
    return found
