"""Steps whose batches are read, but not trained on: the recipe's, and those that a rewind jumps over."""

from collections.abc import Callable, Iterator
from typing import Any

from megatron_txssm.checkpoint.fallback import from_rank_0
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.hooks import Call, Listener
from megatron_txssm.training.guard.spikes import read_spikes

# What Megatron's train_step returns: losses, whether it was skipped, ...
type StepResult = tuple[Any, ...]
SKIPPED, GRAD_NORM = 1, 5


class SkippedSteps(Listener):
    """Lets steps pass without forward, backward and update, as skipped steps of Megatron's loop.

    Not by Megatron's own --iterations-to-skip: it advances the data of the first tensor-parallel rank only, and neither
    logs, validates nor saves at such a step, not even the last one.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.steps = recipe, recipe.skip_steps

    def before_setup(self, call: Call) -> None:
        spikes = from_rank_0(lambda: read_spikes(self.recipe.run_path))
        self.steps = self.recipe.skip_steps.union(*(spike.jumped for spike in spikes))

    def around_step(self, call: Call, proceed: Callable[[], StepResult]) -> StepResult:
        from megatron.core.rerun_state_machine import get_rerun_state_machine

        if call.iteration + 1 not in self.steps:
            return proceed()
        read_batches(call.data_iterator)
        advance_schedule(call.opt_param_scheduler)
        return {}, 1, *get_rerun_state_machine().should_checkpoint_and_exit(), None, None, 0


def is_read_only(result: StepResult) -> bool:
    """Whether a step only read its batches."""
    return bool(result[SKIPPED]) and result[GRAD_NORM] is None


def read_batches(data_iterator: Iterator[Any] | list[Iterator[Any]] | None) -> None:
    """Read one global batch, as a training step does; a list has an iterator per virtual pipeline stage."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    while get_rerun_state_machine().should_run_forward_backward(data_iterator):  # pyright: ignore[reportArgumentType]
        for _ in range(get_num_microbatches()):
            for iterator in iterators:
                if iterator is not None:
                    next(iterator)


def advance_schedule(opt_param_scheduler: Any) -> None:
    """Count a skipped step in the schedule, which Megatron does not: step n has one learning rate in every run."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    opt_param_scheduler.step(increment=get_current_global_batch_size())
