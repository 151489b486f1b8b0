"""Times the parts of training steps by hooks between the layers of a model that is one pipeline stage."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_txssm.planning.kernels import HEAD

# Marks besides the layers' numbers: the model is called, its first layer is, it returns the loss.
CALLED, ENTERED, LOST = "called", "entered", "lost"
# Pass, and place in the model.
Mark = tuple[str, str | int]


class Clock:
    """Marks in the time of the GPU's stream, or of this process."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self._marks: list[tuple[Mark, Any]] = []

    def mark(self, passes: str, place: str | int) -> None:
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append(((passes, place), now))

    def read(self) -> list[tuple[Mark, float]]:
        """All marks since the last call, in seconds."""
        marks, self._marks = self._marks, []
        if not self.on_gpu or not marks:
            return marks
        torch.cuda.synchronize()
        first = marks[0][1]
        return [(what, first.elapsed_time(now) / 1000) for what, now in marks]


class Parts:
    """Seconds of what micro-batches consist of, while hooks are set (`timed`).

    A gradient arrives at a layer's output when all behind it is done, so the time between the gradients of a layer's
    output and input is that of its backward pass.

    Attributes:
        forward, backward: layer symbol or HEAD -> of each call
        outside: of each micro-batch, what neither is
        passes: of each step, all its micro-batches
    """

    def __init__(self, model: nn.Module, symbols: str):
        [self._model] = [module for module in model.modules() if hasattr(module, "decoder")]
        self._symbols, self._clock = symbols, Clock()
        self.forward: dict[str, list[float]] = defaultdict(list)
        self.backward: dict[str, list[float]] = defaultdict(list)
        self.outside: list[float] = []
        self.passes: list[float] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        model: Any = self._model
        layers = list(model.decoder.layers)
        assert len(layers) == len(self._symbols), f"{len(layers)} layers, not {self._symbols}"
        hooks = [
            model.register_forward_pre_hook(lambda *_: self._clock.mark("forward", CALLED)),
            layers[0].register_forward_pre_hook(self._before_layers, with_kwargs=True),
            *(layer.register_forward_hook(self._after(number)) for number, layer in enumerate(layers)),
            model.register_forward_hook(self._after(LOST)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before_layers(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._mark(named["hidden_states"] if "hidden_states" in named else args[0], ENTERED)

    def _after(self, place: str | int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: self._mark(output[0] if isinstance(output, tuple) else output, place)

    def _mark(self, tensor: Tensor, place: str | int) -> None:
        """Now, and when its gradient arrives."""
        self._clock.mark("forward", place)
        tensor.register_hook(lambda _: self._clock.mark("backward", place))

    def forget(self) -> None:
        self._clock.read()

    def collect(self) -> None:
        """Add the step since the last call of this or of `forget`."""
        marks = self._clock.read()
        starts = [index for index, (what, _) in enumerate(marks) if what == ("forward", CALLED)]
        for begin, end in zip(starts, [*starts[1:], len(marks)], strict=True):
            inside = self._add(dict(marks[begin:end]))
            if end < len(marks):
                self.outside.append(marks[end][1] - marks[begin][1] - inside)
        self.passes.append(marks[-1][1] - marks[0][1])

    def _add(self, at: dict[Mark, float]) -> float:
        """Add the parts of a micro-batch; returns their sum."""
        places = [ENTERED, *range(len(self._symbols)), LOST]
        total = 0.0
        for before, place, part in zip(places, places[1:], [*self._symbols, HEAD], strict=False):
            forward = at["forward", place] - at["forward", before]
            backward = at["backward", before] - at["backward", place]
            self.forward[part].append(forward)
            self.backward[part].append(backward)
            total += forward + backward
        return total

    def medians(self) -> dict[str, tuple[float, float]]:
        """Of each kind of layer and the head: seconds forward and backward."""
        return {
            part: (statistics.median(self.forward[part]), statistics.median(self.backward[part]))
            for part in self.forward
        }
