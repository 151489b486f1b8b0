"""What a run tells: exact losses on file, throughput, validation losses."""

import json
import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_txssm.planning.flops import flops_per_token
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.training import monitor
from megatron_txssm.training.monitor import TrainingMonitor


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)
    return clock


class FakeMegatron:
    """Megatron's loop as far as the monitor hooks into it: each step takes the given seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Clock, run: Path, **changes: Any):
        self.args = SimpleNamespace(
            rank=0,
            world_size=4,
            iteration=0,
            train_iters=100,
            log_interval=1,
            global_batch_size=8,
            seq_length=256,
            consumed_train_samples=0,
            pipeline_model_parallel_size=1,
            validation_set_names=None,
        )
        vars(self.args).update(changes)
        self.clock = clock
        self.written: list[tuple[str, float, int]] = []
        writer = SimpleNamespace(add_scalar=lambda *scalar: self.written.append(scalar))
        monkeypatch.setattr(monitor, "get_args", lambda: self.args)
        monkeypatch.setattr(monitor, "get_tensorboard_writer", lambda: writer)
        monkeypatch.setattr(monitor, "get_wandb_writer", lambda: None)
        loop: Any = monitor.megatron_training
        monkeypatch.setattr(loop, "training_log", lambda *a, **k: "logged")
        monkeypatch.setattr(loop, "train_step", self._train_step)
        monkeypatch.setattr(loop, "evaluate", lambda losses: (losses, None, False))
        monkeypatch.setattr(loop, "evaluate_and_print_results", lambda sets: [loop.evaluate(s) for s in sets])
        monkeypatch.setattr(loop, "num_floating_point_operations", None)
        self.loop = loop
        self.recipe = load_recipe("demo_cpu", [f"run_directory={run}"])
        self.terminal = StringIO()
        self.monitor = TrainingMonitor(self.recipe, self.terminal)
        self.monitor.install()

    def _train_step(self, seconds: float) -> str:
        self.clock.now += seconds
        return "stepped"

    def step(self, iteration: int, loss: Any = 4.0, seconds: float = 2.0) -> None:
        assert self.loop.train_step(seconds) == "stepped"
        self.args.consumed_train_samples += self.args.global_batch_size
        # Megatron's own call, by position.
        logged = self.loop.training_log(
            {"lm loss": torch.as_tensor(loss)}, {}, 3e-4, iteration, 1.0, False, 0, torch.tensor(0.5), None, None
        )
        assert logged == "logged"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.recipe.run_path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path) -> FakeMegatron:
    return FakeMegatron(monkeypatch, clock, tmp_path)


def test_losses_are_kept_exactly(megatron: FakeMegatron) -> None:
    # The neighbour of 4 differs in the last bit only.
    losses = [torch.tensor(4.0).nextafter(torch.tensor(5.0)), torch.tensor(1 / 3), torch.tensor(1e-42)]
    for iteration, loss in enumerate(losses, start=1):
        megatron.step(iteration, loss)
    read = [torch.tensor(line["lm loss"], dtype=torch.float32) for line in megatron.metrics]
    assert all(a.equal(b) for a, b in zip(read, losses, strict=True))
    assert [line["iteration"] for line in megatron.metrics] == [1, 2, 3]
    assert [line["consumed_tokens"] for line in megatron.metrics] == [2048, 4096, 6144]
    assert megatron.metrics[0]["grad_norm"] == 0.5
    assert megatron.metrics[0]["learning_rate"] == 3e-4


def test_throughput(megatron: FakeMegatron) -> None:
    megatron.step(1, seconds=2.0)
    megatron.step(2, seconds=0.5)
    tokens = 8 * 256
    assert [line["tokens_per_second"] for line in megatron.metrics] == pytest.approx([tokens / 2, tokens / 0.5])
    flops = flops_per_token(megatron.recipe, megatron.recipe.training.seq_length)
    expected = tokens / 2 * flops / 1e12 / 4
    assert megatron.metrics[0]["model_tflops_per_second_per_rank"] == pytest.approx(expected)
    # What Megatron's own line divides by its time.
    assert megatron.loop.num_floating_point_operations(megatron.args, 8) == pytest.approx(tokens * flops)


def test_time_between_steps_is_not_training(megatron: FakeMegatron, clock: Clock) -> None:
    megatron.step(1)
    clock.now += 1000  # an evaluation, a save
    megatron.step(2)
    assert megatron.metrics[1]["tokens_per_second"] == pytest.approx(8 * 256 / 2)


def test_lines_come_at_the_interval_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path
) -> None:
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, log_interval=4, train_iters=6)
    for iteration, seconds in enumerate([1, 1, 1, 5, 1, 3], start=1):
        megatron.step(iteration, seconds=seconds)
    assert re.findall(r"^iteration (\d)/6", megatron.terminal.getvalue(), re.MULTILINE) == ["4", "6"]
    # Averaged over the interval.
    assert megatron.metrics[3]["tokens_per_second"] == pytest.approx(8 * 256 * 4 / 8)
    assert megatron.metrics[5]["tokens_per_second"] == pytest.approx(8 * 256 * 2 / 4)
    assert len(megatron.metrics) == 6
    assert [(name, step) for name, _, step in megatron.written] == [("tokens-per-second", 4), ("tokens-per-second", 6)]


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, clock: Clock, tmp_path: Path) -> None:
    megatron = FakeMegatron(monkeypatch, clock, tmp_path, rank=1)
    megatron.step(1)
    megatron.loop.evaluate_and_print_results([{"lm loss": torch.tensor(3.0)}])
    megatron.monitor.close()
    assert megatron.terminal.getvalue() == ""
    assert not (tmp_path / "metrics.jsonl").exists()


def test_validation_losses(megatron: FakeMegatron) -> None:
    megatron.step(5)
    megatron.loop.evaluate_and_print_results([{"lm loss": torch.tensor(3.25)}])
    assert megatron.metrics[-1] == {"iteration": 5, "validation lm loss": 3.25}
    assert megatron.terminal.getvalue().endswith("iteration 5 | validation lm loss 3.2500\n")
    megatron.loop.evaluate_and_print_results([{"lm loss": torch.tensor(x)} for x in (3.0, 2.0)])
    assert megatron.metrics[-1] == {"iteration": 5, "validation-0 lm loss": 3.0, "validation-1 lm loss": 2.0}
    # The time limit came first: nothing to tell.
    count = len(megatron.metrics)
    megatron.loop.evaluate_and_print_results([None])
    assert len(megatron.metrics) == count
