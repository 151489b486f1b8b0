"""Reports to TensorBoard, Weights & Biases and MLflow, on the last rank, where Megatron has its other numbers.

All trackers get the same events: the numbers of metrics.jsonl under their names there, and what else Megatron reports
to TensorBoard (loss-scale, params-norm, timers, …) under Megatron's names. `Trackers` takes the place of Megatron's
TensorBoard writer; Megatron's own W&B writer is not used, because it ends the training if W&B does not answer.

Each tracker has a thread, so one that fails or hangs neither stops nor slows the training.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from megatron_txssm.errors import shown

# Megatron's names of numbers that metrics.jsonl has, under these names or others.
_KNOWN = {"lm loss", "learning-rate", "grad-norm", "world-size", "load_balancing_loss"}
# Events kept for a tracker that does not take them; then the oldest are lost.
MOST_EVENTS = 20_000
# Before a tracker that failed is tried again, and for what the trackers have left at the end.
RETRY_SECONDS, CLOSE_SECONDS = 60.0, 30.0


class Event(NamedTuple):
    """Numbers of one step, by name."""

    step: int
    # Seconds since the epoch.
    time: float
    values: dict[str, float]


class Tracker(Protocol):
    """Its methods are called in its own thread; they may block, and raise any exception."""

    name: str

    def open(self) -> None: ...

    def log(self, events: list[Event]) -> None: ...

    def close(self, exit_code: int) -> None:
        """0 at the end of the training or if it can be resumed; 1 after a failure."""
        ...


class Trackers:
    """All trackers of a run. Looks to Megatron like its TensorBoard writer, which is `writer` if there is one."""

    def __init__(self, trackers: list[Tracker], interval: int, say: Callable[[str], None], writer: Any = None):
        self.feeds = [_Feed(tracker, say) for tracker in trackers]
        self.interval = interval
        self.writer = writer

    def log(self, values: Mapping[str, object], step: int) -> None:
        """Report the numbers of a line of metrics.jsonl."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        numbers.pop("iteration", None)
        self._put(Event(step, time.time(), numbers))

    def log_step(self, values: Mapping[str, object], step: int) -> None:
        """The same for the steps at which Megatron reports to TensorBoard."""
        if step % self.interval == 0:
            self.log(values, step)

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int, *_: object) -> None:
        """Called by Megatron. Validation losses and those "vs samples" are in the events of `log`."""
        if tag not in _KNOWN and " vs samples" not in tag and " validation" not in tag:
            self._put(Event(global_step, time.time(), {tag: float(scalar_value)}))

    def flush(self) -> None:
        """Called by Megatron at the end; `close` does it."""

    def __getattr__(self, name: str) -> Any:
        # What else Megatron calls, such as add_text: TensorBoard alone has it.
        return getattr(self.writer, name) if self.writer is not None else lambda *_, **__: None

    def close(self, exit_code: int) -> None:
        """End the trackers' runs; waits for `CLOSE_SECONDS` at most."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for feed in self.feeds:
            feed.end(exit_code)
        for feed in self.feeds:
            feed.join(max(0.0, deadline - time.monotonic()))
            if feed.is_alive():
                feed.say(f"warning: {feed.name} has not taken everything after {CLOSE_SECONDS:.0f} s; going on without")

    def _put(self, event: Event) -> None:
        for feed in self.feeds:
            feed.put(event)


class _Feed(threading.Thread):
    """Passes events to one tracker, and again those that it failed to take."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None]):
        super().__init__(daemon=True, name=tracker.name)
        self.tracker, self.say = tracker, say
        self.events: deque[Event] = deque(maxlen=MOST_EVENTS)
        self.news, self.ending = threading.Event(), threading.Event()
        self.exit_code = 0
        self.complaint = ""
        self.start()

    def put(self, event: Event) -> None:
        self.events.append(event)
        self.news.set()

    def end(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self.ending.set()
        self.news.set()

    def run(self) -> None:
        if self._insist(self.tracker.open) and self._pass_on():
            self._insist(lambda: self.tracker.close(self.exit_code))

    def _pass_on(self) -> bool:
        """Pass on all events until the end; False if the tracker did not take the last ones."""
        ending = False
        while not ending:
            self.news.wait()
            self.news.clear()
            # Asked first: everything reported before the end is among the events then.
            ending = self.ending.is_set()
            batch = [self.events.popleft() for _ in range(len(self.events))]
            if not self._insist(lambda batch=batch: self.tracker.log(batch)):
                return False
        return True

    def _insist(self, action: Callable[[], None]) -> bool:
        """Try an action until it succeeds; False if it fails when the training has ended."""
        while True:
            last = self.ending.is_set()
            try:
                action()
                return True
            except Exception as error:  # a tracker must not end a training
                self._complain(f"{type(error).__name__}: {error}")
            if last:
                return False
            self.ending.wait(RETRY_SECONDS)

    def _complain(self, why: str) -> None:
        """Once for each reason."""
        if why != self.complaint:
            self.complaint = why
            self.say(f"warning: {self.name} failed, while the training goes on: {shown(why)}")
