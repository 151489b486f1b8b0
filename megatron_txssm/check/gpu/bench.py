"""The machine that a check runs on, its remaining time, and the processes that it started."""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_txssm.check.gpu.children import Child
from megatron_txssm.check.gpu.trainings import SMALL_SIZES, Training, tokens_for

Device = Literal["cuda", "cpu"]
# Each imports for many seconds on one core before it computes.
MOST_CHILDREN = 12


@dataclass
class Bench(AbstractContextManager["Bench"]):
    """`deadline` is of the monotonic clock; `small`: use sizes for a machine without a GPU."""

    device: Device
    small: bool
    deadline: float
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="txssm-check-gpu-")))
    transformer_engine: bool = False
    _children: list[Child] = field(default_factory=list)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for child in self._children:
            child.end()
        if kind is not None:
            # Interrupted, for example by Ctrl-C. Otherwise the caller keeps the logs if something is wrong.
            shutil.rmtree(self.folder)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def at_once(self) -> int:
        return min(MOST_CHILDREN, len(os.sched_getaffinity(0)))

    def start(
        self, kind: str, name: str, environment: dict[str, str] | None = None, *, waits: bool = False, **task: Any
    ) -> Child:
        on_cpu = self.device == "cpu" or task.pop("on_cpu", False)
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
        words = {"kind": kind, "device": "cpu" if on_cpu else "cuda", "small": self.small, **task}
        child = Child(self.folder, name, words, hidden | (environment or {}), waits=waits)
        self._children.append(child)
        return child

    def start_training(self, training: Training, vocab_size: int, *, waits: bool = False) -> Child:
        sizes = SMALL_SIZES if self.small else {}
        recipe = training.changed_recipe(self.folder, tokens_for(self.folder, vocab_size), sizes)
        file = self.folder / f"{training.name}.recipe.yaml"
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        return self.start(
            "train",
            training.name,
            training.environment,
            waits=waits,
            on_cpu=training.on_cpu,
            recipe=str(file),
        )

    def finish(self, child: Child, limit: float) -> dict[str, Any]:
        """The process's result or failure, within `limit` seconds from now and the check's deadline."""
        return self._wait(child, time.monotonic() + limit)

    def _wait(self, child: Child, until: float) -> dict[str, Any]:
        # A machine without a GPU only has the check's deadline.
        until = math.inf if self.small else until
        found = child.wait(min(self.deadline, until))
        late = "error" in found and self.deadline < until and self.seconds_left <= 0
        # The check ran out of time; the process is not at fault.
        return {"refused": "not finished within --budget"} if late else found

    def prepare(self, trainings: Sequence[Training], vocab_size: int, beside: int) -> dict[str, Child]:
        """Start processes that wait for `begin`, as many as fit beside others that compute; by name."""
        few = trainings[: max(0, self.at_once - beside)]
        return {training.name: self.start_training(training, vocab_size, waits=True) for training in few}

    def train_all(
        self, trainings: Sequence[Training], vocab_size: int, prepared: dict[str, Child], limit: float
    ) -> dict[str, dict[str, Any]]:
        """Each training's result, by name; `limit`: seconds for all."""
        until = time.monotonic() + limit
        found: dict[str, dict[str, Any]] = {}
        running: list[Child] = []
        for training in trainings:
            if len(running) == self.at_once:
                first = running.pop(0)
                found[first.name] = self._wait(first, until)
            running.append(prepared.get(training.name) or self.start_training(training, vocab_size, waits=True))
            running[-1].begin()
        found |= {child.name: self._wait(child, until) for child in running}
        for training in trainings:
            if training.continues and found[training.name].keys() == {"refused"} and self.seconds_left > 0:
                # The run that it continues could train, so the checkpoint is at fault.
                found[training.name] = {"error": found[training.name]["refused"]}
        return found
