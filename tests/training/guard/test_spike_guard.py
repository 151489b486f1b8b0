"""The guard's decisions on Megatron's own optimizer and schedule, in a loop that gives it losses and gradients."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_txssm.platform import prepare_platform
from megatron_txssm.recipe.loader import load_recipe

prepare_platform()

from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import training

from megatron_txssm.checkpoint import steps
from megatron_txssm.session.hooks import listen, listening
from megatron_txssm.training.guard import skipped_steps, spike_guard
from megatron_txssm.training.guard.spike_guard import Diverged, Rewind, SpikeGuard
from megatron_txssm.training.guard.spikes import read_spikes

pytestmark = pytest.mark.usefixtures("one_process")

WINDOW = 8
FIELDS = ("training.train_iters=400", f"guard.spike_window={WINDOW}", "guard.max_spikes=2", "guard.rewind_steps=3")
loop: Any = training


class Loop:
    """Megatron's loop as far as the guard listens to it: one weight, whose gradient and loss each step states."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path, *fields: str, saved: dict[str, Any] | None = None):
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.recipe = load_recipe("demo_cpu", [f"run_directory={run}", *FIELDS, *fields])
        run.mkdir(exist_ok=True)
        sgd = torch.optim.SGD([{"params": [self.weight], "max_lr": 1.0, "min_lr": 0.0, "lr": 1.0}], lr=1.0)
        config = OptimizerConfig(clip_grad=0.0)
        self.optimizer = ChainedOptimizer([FP32Optimizer(sgd, config, lambda optimizer: None)])
        self.schedule = OptimizerParamScheduler(
            self.optimizer, 0.0, 1.0, 0.0, 0, 800, "linear", 0.0, 0.0, 0, "constant"
        )
        self.said: list[str] = []
        self.waited = 0
        monkeypatch.setattr(spike_guard, "get_args", lambda: _Args)
        monkeypatch.setattr(skipped_steps, "advance_schedule", lambda schedule: schedule.step(increment=2))
        monkeypatch.setattr(spike_guard, "advance_schedule", lambda schedule: schedule.step(increment=2))
        monkeypatch.setattr(loop, "setup_model_and_optimizer", lambda: self._set_up(saved))
        monkeypatch.setattr(loop, "load_checkpoint", self._load)
        monkeypatch.setattr(loop, "train_step", self._train_step)
        monkeypatch.setattr(loop, "training_log", self._log)
        monkeypatch.setattr(loop, "maybe_finalize_async_save", self._finalize)
        listen(SpikeGuard(self.recipe, self.said.append))
        loop.setup_model_and_optimizer()

    def _set_up(self, saved: dict[str, Any] | None) -> tuple[Any, Any, Any]:
        if saved is not None:
            loop.load_checkpoint(None, self.optimizer, self.schedule, saved)
        return None, self.optimizer, self.schedule

    def _load(self, ddp_model: Any, optimizer: Any, opt_param_scheduler: Any, saved: dict[str, Any]) -> None:
        opt_param_scheduler.load_state_dict(saved)

    def _train_step(
        self, data_iterator: Any, optimizer: Any, opt_param_scheduler: Any, forward_backward_func: Any, iteration: int
    ) -> tuple[Any, ...]:
        forward_backward_func()
        updated, norm, _ = optimizer.step()
        if updated:
            opt_param_scheduler.step(increment=2)
        return {}, int(not updated), False, False, 0, norm, None, 0

    def _log(
        self,
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        skipped_iter: int,
        grad_norm: Any,
    ) -> None: ...

    def _finalize(self, blocking: bool = False) -> None:
        self.waited += blocking

    def step(self, number: int, loss: float, gradient: float = 1.0) -> bool:
        """Whether the step updated the weight. Two micro-batches, of 3 tokens and of 1."""
        self.weight.main_grad = torch.tensor([gradient])  # pyright: ignore[reportAttributeAccessIssue]
        sums = [{"lm loss": torch.tensor([loss * count, count])} for count in (3.0, 1.0)]
        before = self.weight.item()
        result = loop.train_step(None, self.optimizer, self.schedule, lambda: sums, number - 1)
        updated = self.weight.item() != before
        assert updated is not bool(result[1])
        loop.training_log({}, {}, None, number, result[1], result[5])
        return updated

    def fill(self, first: int = 1) -> None:
        """The window, with losses of mean 3 and deviation 1 and gradient norms of mean 2 and deviation 0.5."""
        for number in range(first, first + WINDOW):
            assert self.step(number, 2.0 + 2 * (number % 2), 1.5 + (number % 2))


class _Args:
    rank, world_size = 0, 1


@pytest.fixture(autouse=True)
def nobody_listens_after_a_test() -> Iterator[None]:
    with listening():
        yield


def test_a_spike_of_loss_or_norm_is_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=skip")
    run.fill()
    assert not run.step(9, loss=9.5)
    assert run.step(10, loss=8.0), "it is no spike, and the one before is not in the window"
    assert run.step(11, loss=3.0, gradient=4.0)
    assert not run.step(12, loss=3.0, gradient=40.0)
    loss, norm = read_spikes(run.recipe.run_path)
    assert (loss.step, loss.action, loss.loss, loss.grad_norm) == (9, "skip", 9.5, 1.0)
    assert (loss.loss_z_score, loss.grad_norm_z_score) == pytest.approx((6.5, -2.0))
    assert norm.step == 12 and norm.grad_norm_z_score is not None and norm.grad_norm_z_score > 6
    assert [words.partition(":")[0] for words in run.said] == ["warning"] * 2
    # Trained on or not, every step counts in the schedule.
    assert run.schedule.num_steps == 2 * 12


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float) -> None:
    run = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=skip")
    assert run.step(1, loss=3.0)
    assert not run.step(2, loss=value)
    assert not run.step(3, loss=3.0, gradient=value)
    spikes = read_spikes(run.recipe.run_path)
    assert [(spike.loss, spike.grad_norm) for spike in spikes] == [(None, 1.0), (3.0, None)]


def test_a_resumed_run_judges_with_the_window_of_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=skip")
    run.fill()
    saved = run.schedule.state_dict()
    with listening():
        resumed = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=skip", saved=saved)
        assert resumed.schedule.num_steps == 2 * WINDOW
        assert not resumed.step(9, loss=9.5)
        assert resumed.schedule.state_dict()["spike_window"] == saved["spike_window"]
    del saved["spike_window"]
    with listening():
        unknown = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=skip", saved=saved)
        assert unknown.step(9, loss=9.5), "a checkpoint of a run without the guard has no window"


def test_one_spike_too_many_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=skip")
    run.fill()
    assert not run.step(9, loss=100.0)
    # Done again after a restart, it counts once; and those before the last steps no more.
    assert not run.step(9, loss=100.0)
    assert not run.step(10, loss=100.0)
    with pytest.raises(Diverged, match=r"more than 2 spikes .* within 8 steps"):
        run.step(11, loss=100.0)
    assert [spike.action for spike in read_spikes(run.recipe.run_path)] == ["skip", "skip", "stop"]
    assert not run.step(18, loss=100.0)
    # So it is after a restart.
    with listening():
        resumed = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=skip", saved=run.schedule.state_dict())
        with pytest.raises(Diverged):
            resumed.step(12, loss=100.0)


def test_a_stage_begins_with_an_empty_window(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages = "data.stages=[{tokens: 18432, weights: {a: 1}}, {weights: {b: 1}}]"
    run = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=skip", stages)
    assert run.recipe.stage_iters == (9, 391)
    run.fill()
    assert not run.step(9, loss=9.5)
    assert run.step(10, loss=9.5)


@pytest.mark.parametrize(
    ("saved", "back_to", "jumped"),
    [([4, 8, 12], 4, (6, 9)), ([], 0, (6, 9)), ([7, 8], 7, (8, 9)), ([2, 5, 6], 5, (6, 9)), ([12], 0, (6, 9))],
)
def test_a_rewind_goes_to_the_checkpoint_before_the_steps_it_jumps_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, saved: list[int], back_to: int, jumped: tuple[int, int]
) -> None:
    run = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=rewind")
    folder = run.recipe.checkpoint_path
    for number in saved:
        made = folder / f"iter_{number:07d}"
        made.mkdir(parents=True)
        (made / steps.INDEX).write_bytes(b"index")
        (made / steps.FORMAT).write_text("{}")
        # The last one is of an earlier time if it is from after the spike.
        if number < 9:
            steps.write_tracker(folder, steps.Step(number, made))
    run.fill()
    with pytest.raises(Rewind, match=r"^spike at step 9: loss 9.5 .*; the same command continues$"):
        run.step(9, loss=9.5)
    (spike,) = read_spikes(run.recipe.run_path)
    assert (spike.action, spike.back_to, spike.jumped) == ("rewind", back_to, range(jumped[0], jumped[1] + 1))
    assert steps.saved_step(folder) == (back_to or None)
    assert run.waited == 1, "an asynchronous save is completed before"


def test_a_rewind_never_jumps_over_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Loop(monkeypatch, tmp_path / "run", "guard.spike_action=rewind", "guard.rewind_steps=100")
    run.fill()
    with pytest.raises(Rewind, match="jumped over steps 2 to 9"):
        run.step(9, loss=9.5)
