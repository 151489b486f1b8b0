"""The one place that replaces functions of Megatron's training loop, which has no callbacks.

To observe the loop, derive from `Listener` and call `listen` or `listening`. After an upgrade of Megatron, compare
FUNCTIONS with megatron.training.training: its arguments (tests/session/test_hooks.py checks them) and results.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

WHEN = ("before", "around", "after")
# Event -> function of megatron.training.training, and its arguments that a Call has.
FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    # -> [model chunks], optimizer, its schedule; loads the checkpoint.
    "setup": ("setup_model_and_optimizer", ()),
    # -> iterators over training, validation and test data; once per virtual pipeline stage.
    "data": ("build_train_valid_test_data_iterators", ()),
    # -> iteration, FLOPs so far.
    "load": ("load_checkpoint", ("ddp_model", "optimizer", "opt_param_scheduler")),
    # Forward, backward, and the step of optimizer and schedule.
    "step": (
        "train_step",
        ("data_iterator", "optimizer", "opt_param_scheduler", "forward_backward_func", "iteration"),
    ),
    # -> FLOPs of one global batch.
    "flops": ("num_floating_point_operations", ("args", "batch_size", "seqlen_squared_sum_in_batch")),
    # After each step.
    "log": (
        "training_log",
        ("loss_dict", "total_loss_dict", "learning_rate", "iteration", "skipped_iter", "grad_norm"),
    ),
    # All validation sets, or the test set.
    "validation": ("evaluate_and_print_results", ("data_iterator",)),
    # One of them -> its losses (None if the time limit came first), other data, whether the time limit came first.
    "validation_set": ("evaluate", ()),
    "save": ("save_checkpoint", ("iteration", "model", "optimizer", "non_persistent_ckpt")),
    # The end of an asynchronous save (async_save); called at every step.
    "finalize": ("maybe_finalize_async_save", ()),
}


class Call(SimpleNamespace):
    """Arguments of one call, by Megatron's names; the function receives the values that listeners have set."""


class Listener:
    """Handles events of FUNCTIONS by methods with these names; all are optional.

    before_EVENT(call)           in the order in which the listeners were added
    around_EVENT(call, proceed)  returns the result; `proceed()` runs the function, or the next listener's around_EVENT:
                                 the first listener's is the outermost
    after_EVENT(call, result)    in the order in which the listeners were added; not after an exception
    """

    def __init_subclass__(cls) -> None:
        for method in vars(cls):
            when, _, event = method.partition("_")
            if when in WHEN and event not in FUNCTIONS:
                raise TypeError(f"{cls.__name__}.{method}: no event {event!r}; use one of {', '.join(FUNCTIONS)}")


_listeners: list[Listener] = []
# Event -> the function that replaces Megatron's.
_replacements: dict[str, Callable[..., object]] = {}


def listen(listener: Listener) -> None:
    """Add a listener after the existing ones; ignored if an equal one exists."""
    if listener not in _listeners:
        _listeners.append(listener)
        _replace_functions()


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """`listen` for the duration of a `with`, or of a function decorated with it.

    At its end, all listeners added meanwhile are removed, and Megatron's functions restored.
    """
    before = list(_listeners)
    try:
        for listener in listeners:
            listen(listener)
        yield
    finally:
        if len(_listeners) > len(before):
            _listeners[:] = before
            _replace_functions()


def _replace_functions() -> None:
    """Replace the functions that have listeners, and restore the others."""
    from megatron.training import training

    for event, (name, _) in FUNCTIONS.items():
        function = getattr(training, name)
        heard_of = any(_methods(when, event) for when in WHEN)
        if heard_of and not _is_replaced(event, function):
            _replacements[event] = _telling(event, function)
            setattr(training, name, _replacements[event])
        elif not heard_of and function is _replacements.get(event):
            setattr(training, name, function.__wrapped__)


def _is_replaced(event: str, function: Callable[..., object]) -> bool:
    """Also true if other code has wrapped our function meanwhile."""
    ours = _replacements.get(event)
    return inspect.unwrap(function, stop=lambda wrapped: wrapped is ours) is ours


def _telling(event: str, function: Callable[..., object]) -> Callable[..., object]:
    """Megatron's function, with its listeners."""
    name, told = FUNCTIONS[event]
    signature = inspect.signature(function)
    if missing := set(told) - set(signature.parameters):
        raise RuntimeError(f"Megatron's {name} has no argument {', '.join(sorted(missing))}: adapt {__name__} to it")

    @functools.wraps(function)
    def tell_listeners(*args: object, **kwargs: object) -> object:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = Call(**{argument: bound.arguments[argument] for argument in told})

        def proceed() -> object:
            assert vars(call).keys() == set(told), f"{name}: {set(vars(call)) ^ set(told)} is not in FUNCTIONS"
            bound.arguments.update(vars(call))
            return function(*bound.args, **bound.kwargs)

        for before in _methods("before", event):
            before(call)
        run: Callable[[], object] = proceed
        for around in reversed(_methods("around", event)):
            run = functools.partial(around, call, run)
        result = run()
        for after in _methods("after", event):
            after(call, result)
        return result

    return tell_listeners


def _methods(when: str, event: str) -> list[Callable[..., object]]:
    found = (getattr(listener, f"{when}_{event}", None) for listener in _listeners)
    return [method for method in found if method is not None]


@contextmanager
def checkpoint_reads(**instead: Callable[..., Any]) -> Iterator[None]:
    """Let load_checkpoint read its files by other functions: each gets Megatron's own, then its arguments.

    `instead`: by the names of functions in megatron.core.dist_checkpointing.
    """
    from megatron.core import dist_checkpointing

    functions = {name: getattr(dist_checkpointing, name) for name in instead}
    for name, function in functions.items():
        setattr(dist_checkpointing, name, functools.partial(instead[name], function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(dist_checkpointing, name, function)


@contextmanager
def tracker_naming(iteration: int, *, release: bool) -> Iterator[None]:
    """Let load_checkpoint read this step from a checkpoint folder's tracker, regardless of the file's content."""
    from megatron.training import checkpointing

    module: Any = checkpointing
    read = module.read_metadata
    module.read_metadata = lambda tracker_filename: (iteration, release)
    try:
        yield
    finally:
        module.read_metadata = read
