"""A preset of `txssm bench` that takes no time, and a worker that measures nothing."""

from typing import Any

from megatron_txssm.bench.models import PRESETS, Preset
from megatron_txssm.recipe.changes import Changes

_CHANGES: Changes = PRESETS["small"].changes | {
    "model.hidden_size": 32,
    "model.num_attention_heads": 2,
    "model.ffn_hidden_size": 64,
    "model.state_size": 16,
    "model.state_head_dim": 16,
    "data.vocab_size": 64,
}
TINY = Preset("320m", 128, 1, lengths=(64, 128), contexts=(32,), turns=2, steps=2, tokens=3, changes=_CHANGES)
# Seconds of each step.
SECONDS = {"transxssm": 2.0, "llama3": 3.0, "llama3_materialised": 5.0, "llama3_static_cache": 4.0}


class StandIn:
    """In place of `Child`: the seconds above, or the failures that `fail` names; `began` has the names of all."""

    began: list[str]
    fail: dict[str, dict[str, Any]]

    def __init__(self, folder: Any, name: str, task: dict[str, Any], environment: Any, **options: Any):
        self.name, self.task = name, task
        self.began.append(name)

    def wait(self, deadline: float) -> dict[str, Any]:
        if self.task["kind"] == "environment":
            return {"machine": "a machine", "versions": {}, "packages": {}}
        if self.name in self.fail:
            return self.fail[self.name]
        [seconds] = [seconds for model, seconds in SECONDS.items() if f"-{model}-" in self.name]
        if self.task["kind"] == "train":
            # The first warms up.
            return {"rows": [{"step_seconds": s, "peak_memory_bytes": 2**30} for s in (99.0, seconds, seconds)]}
        figures = {"tokens": 3, "seconds": [seconds], "cache_bytes": 10, "weight_bytes": 30, "peak_memory_bytes": 2**30}
        return {part: {str(n): figures for n in self.task[part]} for part in ("prefill", "decoding")}

    def end(self) -> None: ...
