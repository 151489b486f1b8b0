"""Trainings with garbage among their documents: found, traced, jumped over; and resumed as if nothing had happened.

On two pipeline stages, of which only the last knows the loss, and several micro-batches per step.
"""

import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.recipe.changes import Changes
from megatron_txssm.training.guard.spikes import Spike, read_spikes
from tests.data.corpus_fixture import corpus_of, make_corpus
from tests.support.megatron_tasks import run_tasks, train
from tests.support.recipes import write_recipe

TRAIN_ITERS, SAVE_INTERVAL, WINDOW = 20, 4, 8
# The first and the last step after the window is full whose batch has garbage.
FIRST, LAST = 0, 0
GUARD: Changes = {"guard.spike_action": "skip", "guard.spike_window": WINDOW}
REWIND: Changes = {"guard.spike_action": "rewind", "guard.spike_window": WINDOW, "guard.rewind_steps": 2}
STAGES_2: Changes = {"parallel.pipeline_model_parallel_size": 2}
TENSOR_2: Changes = {"parallel.tensor_model_parallel_size": 2}


@dataclass(frozen=True)
class Runs:
    """The folder of the runs."""

    folder: Path

    def spikes(self, name: str) -> list[Spike]:
        return read_spikes(self.folder / name)

    def steps(self, name: str) -> dict[int, dict[str, Any]]:
        """The last line of each step."""
        lines = (json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return {line["iteration"]: line for line in lines if "grad_norm" in line}

    def results(self, name: str) -> dict[int, tuple[float | None, float | None, float]]:
        """Step -> what does not depend on the clock."""
        return {
            step: (line.get("lm loss"), line["grad_norm"], line["learning_rate"])
            for step, line in self.steps(name).items()
        }

    def trained(self, name: str) -> list[int]:
        return [step for step, line in self.steps(name).items() if not line["skipped"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("guarded")
    draw = random.Random(0)
    garbage = [[draw.randrange(60, 300) for _ in range(80)] for _ in range(6)]
    corpus = make_corpus(folder / "corpus", {"clean": [[[5] * 60] * 400], "crawl": [garbage]})
    common: Changes = {
        **corpus_of(corpus),
        "data.weights": {"clean": 97.0, "crawl": 3.0},
        "training.train_iters": TRAIN_ITERS,
        "optimizer.learning_rate": 1e-2,
        "checkpoint.save_interval": SAVE_INTERVAL,
    }

    def recipe(name: str, *changes: Changes, run: str = "") -> dict[str, Path]:
        return {"recipe": write_recipe(folder / f"{name}.yaml", common, *changes, run=folder / (run or name))}

    again = recipe("again", STAGES_2, GUARD, run="killed")
    rewound = recipe("rewound", STAGES_2, REWIND)
    tasks: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (train, recipe("guarded", STAGES_2, GUARD)),
        # Killed after the first spike: the newest checkpoint is from before it.
        (train, recipe("killed", STAGES_2, GUARD, {"megatron.exit_interval": FIRST + 1})),
        (forget_newest, {"run": folder / "killed"}),
        (train, again),
        *[(train_until_rewind, rewound)] * 3,
        # At another layout, the same steps named in the recipe; also the first ones.
        (train, recipe("named", TENSOR_2, {"data.skip_steps": (FIRST, f"{LAST}-{LAST}")})),
    ]
    run_tasks(2, tasks, folder / "ranks")
    return Runs(folder)


def train_until_rewind(recipe: Path) -> None:
    from megatron_txssm.training.guard.spike_guard import Rewind

    with contextlib.suppress(Rewind):
        train(recipe)


def forget_newest(run: Path) -> None:
    """Let the tracker name the checkpoint from before the newest, as after a kill in a save."""
    import torch.distributed

    if torch.distributed.get_rank() == 0:
        steps = sorted(int(path.name.removeprefix("iter_")) for path in (run / "checkpoints").glob("iter_*"))
        (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(steps[-2]))
    torch.distributed.barrier()
