"""A resume under another schedule, at every layout and optimizer: with the switch, this run's holds.

And steps that the spike guard does not train on, on several ranks: each counts in the schedule.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_txssm.recipe.changes import Changes
from megatron_txssm.training.guard.spike_guard import Rewind
from megatron_txssm.training.guard.spikes import read_spikes
from tests.parity.harness import PP2, Case, run_cases, write_tokens
from tests.support.megatron_tasks import Task, train
from tests.support.recipes import TINY, write_recipe

pytestmark = [
    pytest.mark.slow,
    # Of the checkpoint's reader, in this process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

SAVED, END = 2, 3
# Optimizer -> (arguments, whether it is the distributed one, where its fp32 weights are saved).
OPTIMIZERS = {
    "bf16_zero1": ("--bf16", True, "optimizer.state.param."),
    "fp32": ("", False, "decoder."),
    "bf16": ("--bf16", False, "optimizer.state.fp32_param."),
}
SAVED_BY = "--tensor-model-parallel-size 2"
# Where each goes on; the checkpoint's own layout is among them.
LAYOUTS = {
    "bf16_zero1": PP2,
    "fp32": SAVED_BY,
    "bf16": "",
}
ENDS = {
    "undisturbed": "",
    "twice_the_rate": "--override-opt-param-scheduler --lr 2e-3 --min-lr 2e-4",
}
# Run of the spike guard -> its layout and what it does.
TP2: Changes = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
GUARDED: dict[str, Changes] = {
    "data parallel": {"guard.spike_action": "skip"},
    "tensor parallel": TP2 | {"guard.spike_action": "skip"},
    "pipeline parallel": {"parallel.pipeline_model_parallel_size": 2, "guard.spike_action": "rewind"},
}
# The garbage is read in the last step.
GUARDED_STEPS = SPIKE = 24
GARBAGE = 60
GUARD: Changes = {
    "training.train_iters": GUARDED_STEPS,
    "training.micro_batch_size": 1,
    "optimizer.learning_rate": 1e-2,
    "checkpoint.save_interval": 10,
    "data.tokenizer_type": "NullTokenizer",
    "guard.spike_window": 8,
    "guard.rewind_steps": 2,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(optimizer, end) -> Case; `start` is what the others go on from."""
    root = tmp_path_factory.mktemp("schedule")
    data = write_tokens(root / "tokens")
    cases = {}
    for optimizer, (arguments, distributed, _) in OPTIMIZERS.items():
        common = f"--position-encoding rope --train-iters 8 --weight-decay 0 --save-interval 100 {arguments}"
        folders = {end: root / optimizer / end for end in ("start", *ENDS)}
        for end, out in folders.items():
            if end == "start":
                more = f"{SAVED_BY} --exit-interval {SAVED}"
            else:
                more = (
                    f"{LAYOUTS[optimizer]} --load {folders['start'] / 'checkpoint'} --exit-interval {END} {ENDS[end]}"
                )
            cases[optimizer, end] = Case(out, f"{common} --save {out / 'checkpoint'} {more}", distributed)
    run_cases(2, list(cases.values()), data, guarded_runs(root))
    return cases


@pytest.fixture(scope="module")
def guarded(runs):
    """Run of the spike guard -> its folder."""
    return {name: runs["fp32", "start"].out.parents[1] / name for name in GUARDED}


def guarded_runs(root: Path) -> list[Task]:
    """On documents of one repeated token each, but for one of random tokens."""
    from megatron_txssm.data.corpus.shard import write_shard

    draw, end = random.Random(0), TINY.data.vocab_size - 1
    documents = [[7] * 32 for _ in range(4 * GUARDED_STEPS + 8)]
    documents[GARBAGE] = [draw.randrange(end) for _ in range(32)]
    write_shard(documents, root / "repeated", TINY.data.vocab_size, end)
    tasks: list[Task] = []
    for name, changes in GUARDED.items():
        data: Changes = {"data.train": ((1.0, str(root / "repeated")),)}
        recipe = write_recipe(root / f"{name}.yaml", GUARD, data, changes, run=root / name)
        tasks += [(train_until_rewind, {"recipe": recipe})] * (2 if changes["guard.spike_action"] == "rewind" else 1)
    return tasks


def train_until_rewind(recipe: Path) -> None:
    """A task: what a worker does until the guard ends it or the run is over."""
    try:
        train(recipe)
    except Rewind as rewind:
        print(rewind)


def weights(case: Case, step: int, optimizer: str) -> torch.Tensor:
    """All fp32 weights of a checkpoint in a row."""
    prefix = OPTIMIZERS[optimizer][2]
    reader = FileSystemReader(case.out / "checkpoint" / f"iter_{step:07d}")
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in sorted(reader.read_metadata().state_dict_metadata.items())
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_runs_own_schedule_holds(runs, optimizer):
    start = weights(runs[optimizer, "start"], SAVED, optimizer)
    update, twice = (weights(runs[optimizer, end], END, optimizer) - start for end in ("undisturbed", "twice_the_rate"))
    assert update.abs().max() > 1e-4
    # Differences of weights of up to 3, which are rounded to 2.4e-7.
    torch.testing.assert_close(twice, 2 * update, rtol=1e-4, atol=1e-6)


def test_all_ranks_judge_alike(guarded):
    lines = {name: steps_of(run) for name, run in guarded.items()}
    alone = {line["iteration"]: line for line in lines["data parallel"]}
    for name, run in guarded.items():
        (spike,) = read_spikes(run)
        assert (spike.step, spike.action) == (SPIKE, GUARDED[name]["guard.spike_action"]), name
        for line in lines[name]:
            assert line["learning_rate"] == alone[line["iteration"]]["learning_rate"]
            assert line["lm loss"] is None or line["lm loss"] == pytest.approx(
                alone[line["iteration"]]["lm loss"], 1e-4
            )
    assert [step for step, line in alone.items() if line["skipped"]] == [SPIKE]


def test_all_ranks_go_back_and_jump_over_the_spike(guarded):
    done = [(line["iteration"], line["lm loss"] is None) for line in steps_of(guarded["pipeline parallel"])]
    assert done[:SPIKE] == [(step, False) for step in range(1, SPIKE + 1)]
    assert done[SPIKE:] == [(21, False), (22, True), (23, True), (24, True)]


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{"lm loss": None, **line} for line in lines if "grad_norm" in line]
