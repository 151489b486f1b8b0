"""What a run tells: lines or a bar, exact losses on file, throughput, the remaining time."""

import contextlib
import json
import os
import pty
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
from megatron_txssm.training.monitor import BarDisplay, PlainDisplay, TrainingMonitor, describe, make_display

METRICS = {
    "iteration": 20,
    "lm loss": 4.123456,
    "tokens_per_second": 12345.6,
    "model_tflops_per_second_per_rank": 0.1234,
    "learning_rate": 3e-4,
}


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


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


def test_one_line() -> None:
    assert describe(METRICS) == "loss 4.1235 | 12,346 tokens/s | 0.123 TFLOP/s per rank | lr 3.0e-04"
    assert describe(METRICS | {"learning_rate": None}) == "loss 4.1235 | 12,346 tokens/s | 0.123 TFLOP/s per rank"


def test_remaining_time_of_a_resumed_run(clock: Clock) -> None:
    terminal = StringIO()
    display = PlainDisplay(terminal, train_iters=100)
    for iteration, now in ((61, 1000.0), (71, 1020.0), (81, 1060.0)):
        clock.now = now
        display.step(METRICS | {"iteration": iteration})
    # 2 s a step after ten steps, 3 s after twenty; the 60 steps of the first run count for nothing.
    assert re.findall(r"ETA (\S+)", terminal.getvalue()) == ["-", "0:00:58", "0:00:57"]


def test_plain_lines_where_nobody_looks(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w+") as file:
        display = make_display(file, 100)
        assert isinstance(display, PlainDisplay)
        display.step(METRICS)
        display.close()
        file.seek(0)
        text = file.read()
    assert text.startswith("iteration 20/100 | loss 4.1235 | ")
    assert text.count("\n") == 1
    assert "\x1b" not in text and "\r" not in text


def read_all(terminal: int) -> str:
    """What a closed terminal was sent; one read may give only the first part."""
    pieces = []
    with contextlib.suppress(OSError):  # EIO: the other side is closed, and all is read
        while piece := os.read(terminal, 1 << 16):
            pieces.append(piece)
    os.close(terminal)
    return b"".join(pieces).decode()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        display = make_display(terminal, 100)
        assert isinstance(display, BarDisplay)
        display.step(METRICS | {"iteration": 90})
        task = display.progress.tasks[0]
        # Resumed at 90: the steps of the first run say nothing of the pace.
        assert (task.completed, task.total, task.speed) == (90, 100, None)
        display.note("iteration 20 | validation lm loss 3.2500")
        display.close()
    text = read_all(ours)
    assert "90/100" in text
    assert "loss 4.1235" in text
    assert "validation lm loss 3.2500" in text
    # It redraws its line.
    assert "\x1b[2K" in text
