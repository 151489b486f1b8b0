"""Terminal output of a training: a progress bar with a line of figures, or plain lines."""

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.metrics import MetricsLine
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import checkpoint_bytes, data_parallel_size
from megatron_txssm.terminal import beside_the_log, compact, terminal_console

if TYPE_CHECKING:
    from rich.console import RenderableType


def make_display(terminal: TextIO, train_iters: int) -> "PlainDisplay | BarDisplay":
    """A progress bar on an interactive terminal, plain lines elsewhere."""
    redraws = terminal.isatty() and terminal_console(terminal).is_interactive
    return BarDisplay(terminal, train_iters) if redraws else PlainDisplay(terminal, train_iters)


class PlainDisplay:
    """One line per logged step."""

    def __init__(self, terminal: TextIO, train_iters: int):
        self.terminal = terminal
        self.train_iters = train_iters
        self.start_time: float | None = None
        self.start_iteration = 0

    def step(self, metrics: MetricsLine) -> None:
        self.note(
            f"iteration {metrics['iteration']}/{self.train_iters} | {describe(metrics)} | ETA {self._eta(metrics)}"
        )

    def note(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)

    def close(self) -> None: ...

    def _eta(self, metrics: MetricsLine) -> str:
        """Remaining time at the pace since the first logged step, including evaluations and saves."""
        now, iteration = time.monotonic(), metrics["iteration"]
        if self.start_time is None:
            self.start_time, self.start_iteration = now, iteration
            return "-"
        pace = (now - self.start_time) / max(1, iteration - self.start_iteration)
        return str(timedelta(seconds=round(pace * (self.train_iters - iteration))))


class BarDisplay:
    """rich's progress bar over the terminal's width, a line of figures under it, and notes above both."""

    def __init__(self, terminal: TextIO, train_iters: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        class BarAndFigures(Progress):
            figures = ""

            def get_renderables(self) -> "Iterable[RenderableType]":
                yield from super().get_renderables()
                yield Text(self.figures, no_wrap=True, overflow="ellipsis")

        self.progress = BarAndFigures(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            expand=True,
            **beside_the_log(terminal),
        )
        self.task = self.progress.add_task("", total=train_iters)
        self.progress.start()

    def step(self, metrics: MetricsLine) -> None:
        self.progress.figures = describe(metrics)
        self.progress.update(self.task, completed=metrics["iteration"])

    def note(self, text: str) -> None:
        # Brackets are names of validation sets, not markup; the terminal wraps long lines.
        self.progress.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


def describe_run(recipe: Recipe, world_size: int) -> str:
    """`1.31B parameters | 64 processes: TP 2, DP 32 | batch 2.1M tokens (512 x 4096) | 26B tokens in 12,398 steps | …`.

    At its end the size of a checkpoint, if there are any. Of the layout, sizes of 1 are left out.
    """
    parallel, batch = recipe.parallel, recipe.training.global_batch_tokens
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
    }
    layout = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    parts = [
        f"{compact(count_parameters(recipe.sizes).total, 'B')} parameters",
        f"{world_size} process{'es' if world_size > 1 else ''}: "
        + ", ".join([*layout, f"DP {data_parallel_size(recipe, world_size)}"]),
        f"batch {compact(batch, 'B')} tokens ({recipe.global_batch_size} x {recipe.training.seq_length})",
        f"{compact(batch * recipe.train_iters, 'B')} tokens in {recipe.train_iters:,} steps",
    ]
    if recipe.checkpoint.save_interval is not None:
        parts.append(f"checkpoint {compact(checkpoint_bytes(recipe))}B every {recipe.checkpoint.save_interval} steps")
    return " | ".join(parts)


def describe(metrics: MetricsLine) -> str:
    """`loss 4.1234 | 12,345 tokens/s | 412 TFLOP/s per rank | MFU 41.7% | lr 3.0e-04`; skipped steps, if any.

    Without MFU if the GPU's peak is not known. `not_in_bf16`: the run's precision is another than that of the peak.
    """
    parts = [f"loss {metrics['lm loss']:.4f}"] if "lm loss" in metrics else []
    if metrics.get("skipped_steps"):
        parts.append(f"skipped {metrics['skipped_steps']} steps")
    parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"{metrics['model_tflops_per_second_per_rank']:.3g} TFLOP/s per rank")
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}{' of the bf16 peak' if metrics.get('not_in_bf16') else ''}")
    if metrics["learning_rate"] is not None:
        parts.append(f"lr {metrics['learning_rate']:.1e}")
    return " | ".join(parts)
