"""Finds spikes of loss and gradient norm before the optimizer's update, and skips the step or goes back."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_txssm.checkpoint.fallback import from_rank_0
from megatron_txssm.checkpoint.steps import Step, candidates, damage, write_tracker
from megatron_txssm.compat import get_args
from megatron_txssm.notify import notify
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.hooks import Call, Listener
from megatron_txssm.training.guard.skipped_steps import StepResult, advance_schedule
from megatron_txssm.training.guard.spikes import Spike, read_spikes, record_spike
from megatron_txssm.training.guard.window import SpikeWindow

# In the schedule's part of a checkpoint: the window's state.
_KEY = "spike_window"
# Megatron's optimizer skips an update if the gradient norm is above its config's grad_norm_skip_threshold.
_ALWAYS, _NEVER = -1.0, math.inf


class Rewind(Exception):
    """The run goes back to a checkpoint: it must be started again, and continues by itself then."""


class Diverged(Exception):
    """Too many spikes: starting the run again would end in the same way."""


class SpikeGuard(Listener):
    """Judges every step between its backward pass and its update, on values that are the same on every rank.

    The window's state is saved with every checkpoint, so that a resumed run judges as the undisturbed one. `say` writes
    a line to the terminal, on rank 0. Must be added after the monitor, which logs a step before this one ends the run.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]):
        self.recipe, self.say = recipe, say
        self.window = SpikeWindow(recipe.guard.spike_window, recipe.guard.spike_z_score)
        self.spike_steps: set[int] = set()
        # A new blend may have another loss.
        self.stage_starts = {1 + end for end in itertools.accumulate(recipe.stage_iters[:-1])}
        # Of the step under way: its number, the last stage's losses per micro-batch, and its spike, if it is one.
        self.step = 0
        self.losses: list[dict[str, torch.Tensor]] = []
        self.spike: Spike | None = None

    def before_setup(self, call: Call) -> None:
        self.spike_steps = {spike.step for spike in from_rank_0(lambda: read_spikes(self.recipe.run_path))}

    def before_load(self, call: Call) -> None:
        load = call.opt_param_scheduler.load_state_dict

        def load_with_window(state_dict: dict[str, Any]) -> None:
            load(state_dict)
            self.window.restore(state_dict.get(_KEY, ()))

        call.opt_param_scheduler.load_state_dict = load_with_window

    def after_setup(self, call: Call, result: tuple[Any, Any, Any]) -> None:
        _, optimizer, schedule = result
        state_dict, get_grad_norm = schedule.state_dict, optimizer.get_grad_norm
        schedule.state_dict = lambda: state_dict() | {_KEY: self.window.state()}
        optimizer.get_grad_norm = lambda: self._judge(optimizer, get_grad_norm())

    def before_step(self, call: Call) -> None:
        self.step, self.spike = call.iteration + 1, None
        if self.step in self.stage_starts:
            self.window.restore(())

    def around_step(self, call: Call, proceed: Callable[[], StepResult]) -> StepResult:
        forward_backward = call.forward_backward_func

        def keep_losses(*args: Any, **kwargs: Any) -> Any:
            self.losses = forward_backward(*args, **kwargs)
            return self.losses

        call.forward_backward_func = keep_losses
        result = proceed()
        if self.spike is not None:
            advance_schedule(call.opt_param_scheduler)
        return result

    def after_log(self, call: Call, result: object) -> None:
        if (spike := self.spike) is None:
            return
        self.spike = None
        self.spike_steps.add(spike.step)
        run = self.recipe.run_path
        if spike.action == "rewind":
            spike = go_back(self.recipe, spike)
        from_rank_0(lambda: record_spike(run, spike))
        self.say(f"warning: {spike}")
        if get_args().rank == 0:
            notify(run, "spike", str(spike), step=spike.step, action=spike.action)
        if spike.action == "rewind":
            raise Rewind(f"{spike}; the same command continues")
        if spike.action == "stop":
            raise Diverged(
                f"{spike}: it is one of more than {self.recipe.guard.max_spikes} spikes (guard.max_spikes) within "
                f"{self.window.size} steps (guard.spike_window); lower optimizer.learning_rate, or see: txssm why {run}"
            )

    def _judge(self, optimizer: Any, grad_norm: float) -> float:
        """Decide on the step, and let Megatron skip its update if it is a spike; returns the norm for clipping."""
        loss, norm = agreed(self.losses, grad_norm)
        z_scores = self.window.z_scores(loss, norm)
        if self.window.is_spike(z_scores):
            self.spike = Spike(
                self.step,
                self._action(),
                *(value if math.isfinite(value) else None for value in (loss, z_scores[0], norm, z_scores[1])),
                world_size=get_args().world_size,
                time=round(time.time(), 3),
            )
        else:
            self.window.add(loss, norm)
        for part in optimizer.chained_optimizers:
            part.config.grad_norm_skip_threshold = _NEVER if self.spike is None else _ALWAYS
        # NaN is not above any threshold.
        return grad_norm if self.spike is None else norm

    def _action(self) -> Literal["skip", "rewind", "stop"]:
        guard = self.recipe.guard
        recent = [step for step in self.spike_steps if self.step - guard.spike_window < step < self.step]
        return "stop" if len(recent) >= guard.max_spikes else guard.spike_action or "skip"


def agreed(losses: list[dict[str, torch.Tensor]], grad_norm: float | None) -> tuple[float, float]:
    """The global batch's mean loss per token, and the gradient norm: the same bits on every rank; a collective.

    losses: per micro-batch [sum of the tokens' losses, tokens], on the last pipeline stage; ranks that share a sample
    count it equally often. A value that is NaN becomes infinite.
    """
    device = torch.cuda.current_device()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for micro_batch in losses:
        if "lm loss" in micro_batch:
            sums += micro_batch["lm loss"].detach()
    dist.all_reduce(sums)
    norm = torch.tensor(0.0 if grad_norm is None else float(grad_norm), dtype=torch.float64, device=device)
    pair = torch.stack([sums[0] / sums[1], norm]).nan_to_num(nan=math.inf, posinf=math.inf)
    dist.all_reduce(pair, op=dist.ReduceOp.MAX)
    loss, norm = pair.tolist()
    return loss, norm


def go_back(recipe: Recipe, spike: Spike) -> Spike:
    """Make an earlier checkpoint the one that the run resumes from; returns the spike with its steps. A collective.

    It is the newest from before the steps to jump over; otherwise the oldest, or the start of the run.
    """
    from megatron.training import training

    # A checkpoint that is still being written may be the one.
    training.maybe_finalize_async_save(blocking=True)
    # Before its first update, an optimizer has no state that a checkpoint could be resumed from.
    first, folder = max(2, spike.step - recipe.guard.rewind_steps), recipe.checkpoint_path

    def choose() -> Step | None:
        steps = _earlier(folder, spike.step)
        chosen = next((step for step in steps if step.number < first), steps[-1] if steps else None)
        if chosen is not None:
            write_tracker(folder, chosen)
        return chosen

    chosen = from_rank_0(choose)
    back_to = 0 if chosen is None else chosen.number
    return replace(spike, jumped_from=max(first, back_to + 1), back_to=back_to)


def _earlier(folder: Path, step: int) -> list[Step]:
    """The whole checkpoints from before a step that a run may resume from, the newest first."""
    return [found for found in candidates(folder)[0] if found.number < step and not damage(found.folder)]
