"""Reports on a training: display, metrics.jsonl, throughput and learning rate in Megatron's logs."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import TextIO

import psutil
import torch
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_txssm.architecture.flops import flops_per_token
from megatron_txssm.architecture.gpus import gpu_of
from megatron_txssm.compat import get_args
from megatron_txssm.metrics import MetricsLine, end_last_line
from megatron_txssm.notify import notify
from megatron_txssm.ops.ssd_triton import why_unavailable
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.session.hooks import Call, Listener
from megatron_txssm.training.guard.skipped_steps import StepResult, is_read_only
from megatron_txssm.training.validation_sets import of_each_set
from megatron_txssm.training.watch.display import BarDisplay, PlainDisplay, make_display
from megatron_txssm.training.watch.environment import environment
from megatron_txssm.training.watch.stragglers import SlowRunWatch
from megatron_txssm.training.watch.trackers import Trackers

# Megatron's name: 1 if the experts of a layer have equally many tokens, the mean over the layers of experts.
LOAD_BALANCE = "load_balancing_loss"


class TrainingMonitor(Listener):
    """Listens to each step and each validation of Megatron's loop.

    Every rank has one, because the loss is broadcast from the last pipeline stage; rank 0 writes. `metrics.jsonl` holds
    one JSON object per line, with its time in seconds since the epoch: every step's own loss at full precision, the
    experts' load balance if the recipe weights it, every validation loss. A resumed run appends to it, so the last line
    of an iteration counts.

    The learning rate is the one used by the step. Throughput is the mean since the last logged step over the time spent
    in training steps, including data loading but not validations and saves. MFU (`mfu`) is the model FLOPs of the same
    time as a fraction of the bf16 peak of all GPUs, in FP8 as well: two precisions' MFUs compare as their speeds do. It
    is absent where the GPU's peak is not known.
    """

    def __init__(self, recipe: Recipe, terminal: TextIO):
        self.args = get_args()
        self.terminal = terminal
        # On the last rank.
        self.trackers: Trackers | None = None
        self.metrics_file = recipe.run_path / "metrics.jsonl"
        self.display: PlainDisplay | BarDisplay | None = None
        if self.args.rank == 0:
            end_last_line(self.metrics_file)
            self.display = make_display(terminal, self.args.train_iters)
        self.slow_run = SlowRunWatch(
            recipe.logging.slow_throughput_fraction, self.metrics_file, self.args.rank, self.args.world_size
        )
        self.sizes = recipe.sizes
        self.gpu = gpu_of(torch.cuda.get_device_name())
        self.not_in_bf16 = recipe.training.precision != "bf16" or recipe.training.fp8 is not None
        self.balances_experts = recipe.has_experts and recipe.model.moe_aux_loss_coeff > 0
        # LOAD_BALANCE of the last step.
        self.load_balance: dict[str, torch.Tensor] = {}
        self.learning_rate: float | None = None
        # For the last step's global batch.
        self.batch_tokens, self.batch_flops = 0, 0.0
        # From time.perf_counter.
        self.step_began = 0.0
        # For the last step, and since the last logged step.
        self.step_seconds = 0.0
        self.interval_seconds, self.interval_tokens, self.interval_flops = 0.0, 0, 0.0
        self.skipped_steps = 0
        # Whether the last step only read its batches.
        self.read_only = False
        self.iteration: int | None = None
        # Whether metrics.jsonl says how this attempt started.
        self.has_begun = False
        self.first_step_note = first_step_note(recipe)
        # Their ids, one per virtual pipeline stage. The iterators themselves must end with Megatron's loop: their
        # processes ignore SIGTERM, so this one would wait for them forever.
        self.test_iterators: set[int] = set()
        # Step and data of the last validation.
        self.validated: tuple[int | None, str] | None = None
        # Losses by name, one entry per validation set; None if the time limit came first.
        self.validation_losses: list[dict[str, torch.Tensor] | None] = []

    def before_step(self, call: Call) -> None:
        # The scheduler advances within the step, so Megatron would log the next step's rate.
        self.learning_rate = get_canonical_lr_for_logging(call.optimizer.param_groups)
        if self.first_step_note is not None:
            self.say(self.first_step_note)
            self.first_step_note = None
        self.slow_run.begin_step()
        self.step_began = time.perf_counter()

    def after_step(self, call: Call, result: StepResult) -> None:
        self.read_only = is_read_only(result)
        self.step_seconds = time.perf_counter() - self.step_began
        self.slow_run.end_step(self.step_seconds)
        self.interval_seconds += self.step_seconds

    def around_flops(self, call: Call, proceed: Callable[[], float]) -> float:
        """Model FLOPs of one global batch, forward and backward; used by Megatron's own throughput line.

        Megatron counts a state-space layer as attention of another width; this counts the model's actual operations.
        The sum of squared lengths covers the isolated documents of the batch on all ranks, as counted in
        `forward_step`; None if samples are not divided.
        """
        if self.read_only:
            self.batch_tokens, self.batch_flops = 0, 0.0
            return 0.0
        seq_length, squares = call.args.seq_length, call.seqlen_squared_sum_in_batch
        self.batch_tokens = call.batch_size * seq_length
        document_length = seq_length if squares is None else squares / self.batch_tokens
        self.batch_flops = self.batch_tokens * flops_per_token(self.sizes, seq_length, document_length)
        return self.batch_flops

    def before_log(self, call: Call) -> None:
        call.learning_rate = self.learning_rate

    def around_log(self, call: Call, proceed: Callable[[], object]) -> object:
        if not self.balances_experts:
            return proceed()
        # Megatron adds each step's to this tensor, and takes another after it has logged the mean.
        total = call.total_loss_dict.setdefault(LOAD_BALANCE, torch.zeros(1, device="cuda"))
        before = total.clone()
        result = proceed()
        self.load_balance = {LOAD_BALANCE: total - before}
        return result

    def after_log(self, call: Call, result: object) -> None:
        self.on_step(
            call.iteration, call.loss_dict | self.load_balance, call.grad_norm, skipped=bool(call.skipped_iter)
        )

    def after_data(self, call: Call, iterators: tuple[object, object, object]) -> None:
        _, _, test = iterators
        if test is not None:
            self.test_iterators.add(id(test))

    def around_validation(self, call: Call, proceed: Callable[[], object]) -> object:
        # Recognised by its iterators: Megatron names the data only in a message ("iteration 9 on test set").
        of_stages = call.data_iterator if isinstance(call.data_iterator, list) else []
        is_test = any(id(found) in self.test_iterators for found in (call.data_iterator, *of_stages))
        data = "test" if is_test else "validation"
        # At the end, Megatron repeats the validation of the last step.
        if self.validated == (self.iteration, data):
            return None
        call.data_iterator = of_each_set(call.data_iterator, self.args)
        self.validation_losses = []
        result = proceed()
        self.on_validation(data)
        return result

    def after_validation_set(self, call: Call, result: tuple[dict[str, torch.Tensor] | None, object, bool]) -> None:
        losses, _, _ = result
        self.validation_losses.append(losses)

    def on_step(
        self,
        iteration: int,
        loss_dict: dict[str, torch.Tensor],
        grad_norm: float | torch.Tensor | None,
        *,
        skipped: bool,
    ) -> None:
        self.iteration = iteration
        losses = _from_last_stage({key: float(value) for key, value in loss_dict.items()})
        self.interval_tokens += self.batch_tokens
        self.interval_flops += self.batch_flops
        self.skipped_steps += skipped
        seconds = max(self.interval_seconds, 1e-9)
        tokens_per_second = self.interval_tokens / seconds
        flops_per_second = self.interval_flops / seconds / self.args.world_size
        metrics: MetricsLine = {
            "iteration": iteration,
            **losses,
            "learning_rate": self.learning_rate,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "skipped": skipped,
            "consumed_tokens": self.args.consumed_train_samples * self.args.seq_length,
            "tokens_per_second": tokens_per_second,
            "model_tflops_per_second_per_rank": flops_per_second / 1e12,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "step_flops": self.batch_flops,
            "step_seconds": self.step_seconds,
            "world_size": self.args.world_size,
        }
        if self.gpu is not None:
            metrics["mfu"] = flops_per_second / self.gpu.bf16_flops
        changed = self.slow_run.after_step(iteration, self.batch_flops)
        if self.slow_run.verdict is not None:
            metrics["slow"] = self.slow_run.verdict.as_fields()
        if not self.has_begun:
            # Together with the first step: growth of the file means that the run makes progress.
            began = round(psutil.Process().create_time(), 3)
            about = {"start": self._start(), "began": began, "environment": environment()}
            self._write({"iteration": iteration - 1, **about})
            self.has_begun = True
        self._write(metrics)
        if self.trackers is not None:
            self.trackers.log_step(metrics, iteration)
        if changed:
            self._tell_of_slowness(iteration)
        if iteration % self.args.log_interval == 0 or iteration == self.args.train_iters:
            self.interval_seconds, self.interval_tokens, self.interval_flops = 0.0, 0, 0.0
            shown = metrics | {"skipped_steps": self.skipped_steps, "not_in_bf16": self.not_in_bf16}
            self._show(lambda display: display.step(shown))

    def _start(self) -> dict[str, int]:
        """The layout and length of this attempt."""
        names = ("world_size", "data_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
        further = ("context_parallel_size", "expert_model_parallel_size", "global_batch_size", "train_iters")
        return {name: getattr(self.args, name) for name in (*names, *further)}

    def on_validation(self, data: str = "validation") -> None:
        """Report the losses of every validation (or test) set; several sets are named as in TensorBoard."""
        sets = [losses for losses in self.validation_losses if losses is not None]
        if len(sets) == len(self.validation_losses):
            self.validated = self.iteration, data
        known = self.args.validation_set_names or range(len(sets))
        names = [f"{data}-{name}" for name in known] if len(sets) > 1 else [data]
        losses = {
            f"{name} {key}": float(value)
            for name, values in zip(names, sets, strict=False)
            for key, value in values.items()
        }
        losses = _from_last_stage(losses)
        iteration = self.args.iteration if self.iteration is None else self.iteration
        if losses:
            self._write({"iteration": iteration, **losses})
            if self.trackers is not None:
                self.trackers.log(losses, iteration)
            words = " | ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            self._show(lambda display: display.note(f"iteration {iteration} | {words}"))

    def on_scores(self, scores: dict[str, float], seconds: float) -> None:
        """Report the scores of tasks at this step, by "TASK/METRIC", which took so many seconds."""
        iteration = self.args.iteration if self.iteration is None else self.iteration
        self._write({"iteration": iteration, "scores": scores, "score_seconds": round(seconds, 3)})
        if self.trackers is not None:
            self.trackers.log({f"scores/{name}": value for name, value in scores.items()}, iteration)
        words = " | ".join(f"{name.replace('/', ' ')} {value:.4f}" for name, value in scores.items())
        self._show(lambda display: display.note(f"iteration {iteration} | {words}"))

    def say(self, text: str) -> None:
        """Write a line to the terminal and the log, on rank 0."""
        if self.args.rank == 0:
            print(text, flush=True)
            self._show(lambda display: display.note(text))

    def warn(self, text: str) -> None:
        """The same on any rank; called in the trackers' threads."""
        if self.args.rank == 0:
            self.say(text)
            return
        for file in (sys.stdout, self.terminal):
            with contextlib.suppress(OSError):
                print(text, file=file, flush=True)

    def _tell_of_slowness(self, iteration: int) -> None:
        """On rank 0, once when the run becomes slow and once when it recovers."""
        verdict = self.slow_run.verdict
        if verdict is None:
            self._show(lambda display: display.note(f"iteration {iteration} | throughput is back near its median"))
            return
        self._show(lambda display: display.note(f"warning: iteration {iteration} | {verdict}"))
        facts = {"step": iteration, "ranks": verdict.ranks, "nodes": verdict.nodes, "fraction": verdict.fraction}
        notify(self.metrics_file.parent, "slow", f"step {iteration}: {verdict}", **facts)

    def close(self) -> None:
        self._show(lambda display: display.close())

    def _show(self, what: Callable[[PlainDisplay | BarDisplay], None]) -> None:
        """Ignores a closed terminal or pipe: the training continues without a display."""
        if self.display is not None:
            try:
                what(self.display)
            except OSError:
                self.display = None

    def _write(self, metrics: MetricsLine) -> None:
        if self.args.rank > 0:
            return
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics | {"time": round(time.time(), 3)}) + "\n")


def first_step_note(recipe: Recipe) -> str | None:
    """Explains the initial delay; None if the run uses no Triton kernels."""
    by_kernels = recipe.has_state_space and recipe.model.ssd_backend in ("auto", "triton")
    if not by_kernels or why_unavailable() is not None:
        return None
    # Triton caches compiled kernels. docs/gpu-results has the seconds.
    return "the first step compiles and tunes kernels; this takes about a minute, or less if an earlier run has done so"


def _from_last_stage(losses: dict[str, float]) -> dict[str, float]:
    """The losses of the last rank, which is on the last pipeline stage, on every rank."""
    if get_args().pipeline_model_parallel_size == 1:
        return losses
    box = [losses]
    torch.distributed.broadcast_object_list(box, src=torch.distributed.get_world_size() - 1)
    return box[0]
