"""The recorded losses of a run at one of its steps, for the model card."""

import json
from pathlib import Path
from typing import Any

from megatron_txssm.metrics import each_line


def losses_at(run: Path, step: int) -> dict[str, float]:
    """Nats per token, for training and each validation set: from `txssm eval loss`, otherwise the newest recorded."""
    logged = _newest(run / "metrics.jsonl", step)
    losses = {"training loss": logged.pop("lm loss")[1]} if "lm loss" in logged else {}
    if evaluated := _evaluated(run / "evaluation" / "validation.json", step):
        return losses | {f"validation loss, {name}": entry["loss"] for name, entry in evaluated.items()}
    for key, (at, loss) in logged.items():
        name = key.removeprefix("validation").removesuffix(" lm loss").removeprefix("-")
        words = ["validation loss", *([name] if name else []), *([f"at step {at:,}"] if at != step else [])]
        losses[", ".join(words)] = loss
    return losses


def _newest(metrics: Path, step: int) -> dict[str, tuple[int, float]]:
    """Loss -> (its step, its value), up to `step`. A run that went back repeated steps; the last lines count."""
    found: dict[str, tuple[int, float]] = {}
    for line in each_line(metrics):
        try:
            at = int(line["iteration"])
            losses = {k: float(v) for k, v in line.items() if k == "lm loss" or k.startswith("validation")}
        except (ValueError, TypeError, KeyError):
            continue
        if at <= step:
            found |= {key: (at, loss) for key, loss in losses.items() if key not in found or at >= found[key][0]}
    return found


def _evaluated(file: Path, step: int) -> dict[str, Any]:
    """The results of `txssm eval loss`, if it was run at this step."""
    try:
        found = json.loads(file.read_bytes())
        return found["sets"] if found["step"] == step else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
