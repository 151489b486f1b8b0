"""The learning rate of each step: of WSD, and of runs that continue under another schedule than they began."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.recipe.changes import Changes
from tests.support.megatron_tasks import Task, run_tasks, train
from tests.support.recipes import write_recipe
from tests.support.tiny_run import TinyRun, make_tiny_run

PEAK, LOW = 1e-3, 1e-4
ASKED: Changes = {"optimizer.schedule_at_resume": "recipe"}
WSD: Changes = {
    "optimizer.decay_style": "WSD",
    "optimizer.wsd_decay_shape": "linear",
    "optimizer.warmup_fraction": 0.0,
    "checkpoint.save_interval": 2,
}


def lasting(steps: int, decay: int | None = None) -> Changes:
    share: Changes = {} if decay is None else {"optimizer.wsd_decay_fraction": decay / steps}
    return {"training.train_iters": steps, **share}


def until(step: int) -> Changes:
    return {"megatron.exit_interval": step}


# The third step is not trained on, and counts in the schedule, before a resume and after.
DECAYING = WSD | lasting(10, 6) | {"data.skip_steps": (3,)}
# Nine steps would be the end of neither.
LONG, BRANCH = WSD | lasting(90, 9), WSD | ASKED | lasting(9, 3)
COSINE: Changes = {"optimizer.warmup_fraction": 0.0, "checkpoint.save_interval": 2}
# Run -> the settings of its starts; or the run of which it is a copy, and those of the starts after that.
RUNS: dict[str, tuple[str | Changes, ...]] = {
    "wsd": (DECAYING,),
    "wsd_resumed": (DECAYING | until(7), DECAYING | ASKED),
    "long": (LONG | until(6),),
    "branch": ("long", BRANCH),
    "branch_resumed": ("long", BRANCH | until(8), BRANCH),
    # In a folder of its own.
    "branched": (BRANCH | {"checkpoint.branch_from": "long/checkpoints/iter_0000006"} | until(8), BRANCH),
    # Samples of half the length, so twice as many a step.
    "other_batch": (
        COSINE | lasting(2),
        COSINE | ASKED | lasting(6) | {"training.seq_length": 16, "optimizer.learning_rate": 2 * PEAK},
    ),
    "adam": ("long", BRANCH | {"optimizer.weight_decay": 0.5, "optimizer.adam_beta1": 0.5}),
}


@dataclass(frozen=True)
class Seen:
    """What metrics.jsonl says of each step."""

    losses: dict[int, float | None]
    rates: dict[int, float]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    folder = tmp_path_factory.mktemp("schedule")
    made = make_tiny_run(folder / "data")
    tasks: list[Task] = []
    for name, starts in RUNS.items():
        for number, start in enumerate(starts):
            if isinstance(start, str):
                tasks.append((shutil.copytree, {"src": folder / start, "dst": folder / name}))
            else:
                recipe = _write_recipe(folder / "recipes" / f"{name}_{number}.yaml", made, start, folder / name)
                tasks.append((train, {"recipe": recipe}))
    run_tasks(1, tasks, folder / "ranks")
    return {name: _read(folder / name) for name in RUNS}


def _write_recipe(path: Path, made: TinyRun, changes: Changes, run: Path) -> Path:
    data = ((1.0, str(made.folder / "data")),)
    if branch := changes.get("checkpoint.branch_from"):
        changes = changes | {"checkpoint.branch_from": str(run.parent / branch)}
    return write_recipe(path, {"data.train": data, "data.tokenizer_type": "NullTokenizer", **changes}, run=run)


def _read(run: Path) -> Seen:
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "learning_rate" in line]
    losses = {line["iteration"]: line.get("lm loss") for line in steps}
    return Seen(losses, {line["iteration"]: line["learning_rate"] for line in steps})


def test_wsd_is_constant_then_falls(seen: dict[str, Seen]) -> None:
    falls = [LOW + (PEAK - LOW) * (1 - max(0, before - 4) / 6) for before in range(10)]
    assert [step for step, loss in seen["wsd"].losses.items() if loss is None] == [3]
    assert list(seen["wsd"].rates.values()) == pytest.approx(falls, rel=1e-12)


@pytest.mark.parametrize("run", ["wsd", "branch"])
def test_stopped_and_resumed_in_the_decay_it_is_the_same_bit_for_bit(seen: dict[str, Seen], run: str) -> None:
    assert seen[f"{run}_resumed"] == seen[run]


def test_a_long_run_branches_off_to_its_decay(seen: dict[str, Seen]) -> None:
    falls = [LOW + (PEAK - LOW) * (1 - done / 3) for done in range(3)]
    assert list(seen["branch"].rates.values()) == pytest.approx([PEAK] * 6 + falls, rel=1e-12)
    assert [seen["branch"].losses[step] for step in range(1, 7)] == list(seen["long"].losses.values())


def test_a_branch_in_another_folder_is_the_same_bit_for_bit(seen: dict[str, Seen]) -> None:
    last = range(7, 10)
    assert seen["branched"].losses == {step: seen["branch"].losses[step] for step in last}
    assert seen["branched"].rates == {step: seen["branch"].rates[step] for step in last}


def test_longer_at_another_rate_and_batch_it_reaches_its_end(seen: dict[str, Seen]) -> None:
    for step in range(3, 7):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / 6))
        assert seen["other_batch"].rates[step] == pytest.approx(2 * (LOW + (PEAK - LOW) * cosine), rel=1e-9), step


def test_other_adam_settings_hold_from_the_next_step_on(seen: dict[str, Seen]) -> None:
    # The first loss after the resume is that of the loaded weights.
    same, differ = range(1, 8), range(8, 10)
    ours, theirs = seen["adam"].losses, seen["branch"].losses
    assert [ours[step] for step in same] == [theirs[step] for step in same]
    assert all(ours[step] != theirs[step] for step in differ)
