"""Listeners of Megatron's loop: what they are told and can change, in which order, and that they leave no trace."""

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from megatron.training import checkpointing, training

from megatron_txssm.session.hooks import FUNCTIONS, Call, Listener, listen, listening, tracker_naming

loop: Any = training
Log = list[tuple[Any, ...]]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """What happened, in this order; the functions of Megatron's that are used here only write into it."""
    happened: Log = []

    def save_checkpoint(iteration: int, model: Any, optimizer: Any, flops: Any = 0, non_persistent_ckpt: bool = False):
        happened.append(("save", iteration, model, optimizer, flops, non_persistent_ckpt))
        return f"saved {iteration}"

    def train_step(
        data_iterator: Any, optimizer: Any, opt_param_scheduler: Any, forward_backward_func: Any, iteration: int
    ) -> str:
        happened.append(("step", data_iterator, optimizer))
        if data_iterator is None:
            raise StopIteration("no data")
        return "stepped"

    monkeypatch.setattr(training, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(training, "train_step", train_step)
    functions = {name: getattr(training, name) for name, _ in FUNCTIONS.values()}
    with listening():
        yield happened
    assert {name: getattr(training, name) for name in functions} == functions, "some are not as they were"


@dataclass
class Told(Listener):
    """Writes what it is told into the log."""

    name: str
    log: Log = field(compare=False)

    def before_save(self, call: Call) -> None:
        self.log.append((self.name, "before", call.iteration))

    def around_save(self, call: Call, proceed: Callable[[], Any]) -> Any:
        self.log.append((self.name, "around", call.iteration))
        return f"{self.name}({proceed()})"

    def after_save(self, call: Call, result: Any) -> None:
        self.log.append((self.name, "after", result))


class Changes(Listener):
    """Sets arguments before the function runs."""

    def __init__(self, **changes: Any):
        self.changes = changes

    def before_save(self, call: Call) -> None:
        vars(call).update(self.changes)


@pytest.mark.parametrize("event", FUNCTIONS)
def test_megatron_has_these_functions_with_these_arguments(event: str) -> None:
    name, told = FUNCTIONS[event]
    assert set(told) <= set(inspect.signature(getattr(training, name)).parameters)


def test_the_first_listener_is_the_first_told_and_the_outermost(log: Log) -> None:
    listen(Told("a", log))
    listen(Told("b", log))
    assert loop.save_checkpoint(7, "model", "optimizer") == "a(b(saved 7))"
    assert log == [
        ("a", "before", 7),
        ("b", "before", 7),
        ("a", "around", 7),
        ("b", "around", 7),
        ("save", 7, "model", "optimizer", 0, False),
        ("a", "after", "a(b(saved 7))"),
        ("b", "after", "a(b(saved 7))"),
    ]


def test_arguments_have_names_however_they_are_passed(log: Log) -> None:
    class Names(Listener):
        def before_save(self, call: Call) -> None:
            log.append((call.iteration, call.model, call.optimizer, call.non_persistent_ckpt))

    listen(Names())
    loop.save_checkpoint(1, "m", "o", 5, True)
    loop.save_checkpoint(optimizer="o", model="m", iteration=2)
    assert log[::2] == [(1, "m", "o", True), (2, "m", "o", False)]
    assert log[1::2] == [("save", 1, "m", "o", 5, True), ("save", 2, "m", "o", 0, False)]
    with pytest.raises(TypeError, match="optimizer"):
        loop.save_checkpoint(3, "m")


def test_what_a_listener_sets_is_what_megatron_gets(log: Log) -> None:
    listen(Changes(model="another", non_persistent_ckpt=True))
    loop.save_checkpoint(1, "m", "o", 5)
    assert log == [("save", 1, "another", "o", 5, True)]


def test_only_what_the_table_names_can_be_read_or_set(log: Log) -> None:
    listen(Changes(flops=3))
    with pytest.raises(AssertionError, match=r"save_checkpoint: \{'flops'\} is not in FUNCTIONS"):
        loop.save_checkpoint(1, "m", "o")
    assert log == []


def test_around_may_run_the_function_again_or_not_at_all(log: Log) -> None:
    class Repeats(Listener):
        def around_save(self, call: Call, proceed: Callable[[], Any]) -> Any:
            results = []
            for iteration in range(call.iteration):
                call.iteration = iteration
                results.append(proceed())
            return results

    listen(Repeats())
    assert loop.save_checkpoint(2, "m", "o") == ["saved 0", "saved 1"]
    assert [entry[1] for entry in log] == [0, 1]
    assert loop.save_checkpoint(0, "m", "o") == []
    assert len(log) == 2


def test_an_exception_is_what_it_was_and_ends_the_call(log: Log) -> None:
    class Steps(Listener):
        def before_step(self, call: Call) -> None:
            log.append(("before", call.optimizer))

        def after_step(self, call: Call, result: Any) -> None:
            log.append(("after", result))

    listen(Steps())
    assert loop.train_step("tokens", "o", "s", "f", 0) == "stepped"
    with pytest.raises(StopIteration, match="no data") as caught:
        loop.train_step(None, "o", "s", "f", 1)
    assert log == [("before", "o"), ("step", "tokens", "o"), ("after", "stepped"), ("before", "o"), ("step", None, "o")]
    frames = [frame.name for frame in traceback.extract_tb(caught.tb)][1:]
    assert frames == ["tell_listeners", "proceed", "train_step"]


def test_nobody_is_told_twice(log: Log) -> None:
    listener = Changes()
    for _ in range(2):
        listen(listener)
        # Equal to the one before.
        listen(Told("a", log))
    loop.save_checkpoint(1, "m", "o")
    assert [entry[:2] for entry in log] == [("a", "before"), ("a", "around"), ("save", 1), ("a", "after")]


def test_what_others_wrap_is_not_replaced_twice(log: Log) -> None:
    with listening(Told("a", log)):
        told = loop.save_checkpoint

        @functools.wraps(told)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            log.append(("wrapped",))
            return told(*args, **kwargs)

        loop.save_checkpoint = wrapped
        listen(Told("b", log))
        assert loop.save_checkpoint is wrapped
        assert loop.save_checkpoint(1, "m", "o") == "a(b(saved 1))"
    # Nor is it lost at the end.
    assert loop.save_checkpoint is wrapped
    log.clear()
    assert loop.save_checkpoint(1, "m", "o") == "saved 1"
    assert log == [("wrapped",), ("save", 1, "m", "o", 0, False)]
    loop.save_checkpoint = told.__wrapped__


def test_listeners_end_with_the_block_and_leave_no_trace(log: Log) -> None:
    save, step = loop.save_checkpoint, loop.train_step
    outer = Told("outer", log)
    listen(outer)
    with pytest.raises(KeyError), listening(Told("inner", log)):
        listen(Told("within", log))
        assert loop.save_checkpoint(1, "m", "o") == "outer(inner(within(saved 1)))"
        raise KeyError
    assert loop.save_checkpoint(1, "m", "o") == "outer(saved 1)"
    # Nobody listened to steps.
    assert loop.train_step is step

    @listening(Told("decorated", log))
    def train() -> str:
        listen(Told("within", log))
        return loop.save_checkpoint(1, "m", "o")

    for _ in range(2):
        assert train() == "outer(decorated(within(saved 1)))"
    with listening(outer):
        pass
    assert loop.save_checkpoint(1, "m", "o") == "outer(saved 1)", "it listened before"
    assert loop.save_checkpoint.__wrapped__ is save


def test_an_event_that_there_is_not_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Misspelt\.before_stpe: no event 'stpe'; use one of setup, "):

        class Misspelt(Listener):
            def before_stpe(self, call: Call) -> None: ...


def test_an_argument_that_megatron_has_no_more_is_named(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "Megatron's save_checkpoint has no argument iteration, non_persistent_ckpt: adapt megatron_txssm"
    with monkeypatch.context() as another:
        another.setattr(training, "save_checkpoint", lambda step, model, optimizer: "saved")
        with pytest.raises(RuntimeError, match=missing), listening(Told("a", log)):
            pass
        assert loop.save_checkpoint(1, "m", "o") == "saved"
    # Nobody listens any more.
    listen(Told("b", log))
    assert loop.save_checkpoint(1, "m", "o") == "b(saved 1)"


def test_the_tracker_names_another_step_for_a_while() -> None:
    read = checkpointing.read_metadata
    with pytest.raises(KeyError), tracker_naming(12, release=True):
        assert checkpointing.read_metadata("nowhere") == (12, True)
        raise KeyError
    assert checkpointing.read_metadata is read
