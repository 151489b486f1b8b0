"""What a run tells while it trains: a progress bar or plain lines, metrics.jsonl, TensorBoard's throughput."""

import json
import time
from typing import Any, TextIO

import torch
from megatron.training import get_tensorboard_writer, get_wandb_writer
from megatron.training import training as megatron_training

from megatron_txssm.compat import get_args
from megatron_txssm.planning.flops import flops_per_token
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.training.display import make_display


class TrainingMonitor:
    """Listens to Megatron's loop through the functions it calls after each step and each evaluation.

    Every rank has one, since the loss is broadcast from the last pipeline stage; rank 0 writes. `metrics.jsonl` holds
    one JSON object a line: every step's loss at full precision, every validation loss. A resumed run appends to it, so
    the last line of an iteration counts.
    """

    def __init__(self, recipe: Recipe, terminal: TextIO):
        self.args = get_args()
        self.metrics_file = recipe.run_path / "metrics.jsonl"
        self.display = make_display(terminal, self.args.train_iters) if self.args.rank == 0 else None
        self.flops_per_token = flops_per_token(recipe, recipe.training.seq_length)
        self.interval_seconds = 0.0
        self.interval_steps = 0
        self.iteration: int | None = None
        # One entry a validation set, by loss; None where the time limit came first.
        self.validation_losses: list[dict[str, torch.Tensor] | None] = []

    def install(self) -> None:
        """Hook into Megatron's loop, which offers no callbacks of its own."""
        log, step = megatron_training.training_log, megatron_training.train_step
        evaluate, evaluate_all = megatron_training.evaluate, megatron_training.evaluate_and_print_results

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = step(*args, **kwargs)
            self.interval_seconds += time.perf_counter() - start
            self.interval_steps += 1
            return result

        def log_and_report(
            loss_dict: Any, total: Any, learning_rate: Any, iteration: int, *args: Any, **kw: Any
        ) -> Any:
            result = log(loss_dict, total, learning_rate, iteration, *args, **kw)
            grad_norm = kw["grad_norm"] if "grad_norm" in kw else args[3]
            self.on_step(iteration, loss_dict, learning_rate, grad_norm)
            return result

        def evaluate_and_keep(*args: Any, **kwargs: Any) -> Any:
            result = evaluate(*args, **kwargs)
            self.validation_losses.append(result[0])
            return result

        def evaluate_all_and_report(*args: Any, **kwargs: Any) -> Any:
            self.validation_losses = []
            result = evaluate_all(*args, **kwargs)
            # Megatron says which data it was in words: "iteration 9 on test set".
            self.on_validation("test" if str(args[0]).endswith("test set") else "validation")
            return result

        megatron_training.training_log = log_and_report
        megatron_training.train_step = timed_step
        megatron_training.evaluate = evaluate_and_keep
        megatron_training.evaluate_and_print_results = evaluate_all_and_report
        # Megatron bills a state-space layer as attention of another width; ours counts what the model computes.
        megatron_training.num_floating_point_operations = self.floating_point_operations

    def floating_point_operations(self, args: Any, batch_size: int, *_: Any, **__: Any) -> float:
        """Model FLOPs of one global batch, forward and backward; what Megatron's own throughput line divides."""
        return self.flops_per_token * batch_size * args.seq_length

    def on_step(
        self, iteration: int, loss_dict: dict[str, torch.Tensor], learning_rate: float | None, grad_norm: Any
    ) -> None:
        self.iteration = iteration
        losses = _from_last_stage({key: float(value) for key, value in loss_dict.items()})
        tokens_per_step = self.args.global_batch_size * self.args.seq_length
        tokens_per_second = tokens_per_step * self.interval_steps / max(self.interval_seconds, 1e-9)
        metrics = {
            "iteration": iteration,
            **losses,
            "learning_rate": learning_rate,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "consumed_tokens": self.args.consumed_train_samples * self.args.seq_length,
            "tokens_per_second": tokens_per_second,
            "model_tflops_per_second_per_rank": tokens_per_second * self.flops_per_token / 1e12 / self.args.world_size,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        }
        if self.display:
            self._write(metrics)
        if iteration % self.args.log_interval == 0 or iteration == self.args.train_iters:
            self.interval_seconds, self.interval_steps = 0.0, 0
            if self.display:
                self.display.step(metrics)
            # Megatron keeps its writers on the last rank.
            if writer := get_tensorboard_writer():
                writer.add_scalar("tokens-per-second", tokens_per_second, iteration)
            if wandb := get_wandb_writer():
                wandb.log({"tokens-per-second": tokens_per_second}, iteration)

    def on_validation(self, data: str = "validation") -> None:
        """Report the losses of every validation (or test) set; several are told apart as in TensorBoard."""
        sets = [losses for losses in self.validation_losses if losses is not None]
        known = self.args.validation_set_names or range(len(sets))
        names = [f"{data}-{name}" for name in known] if len(sets) > 1 else [data]
        losses = {
            f"{name} {key}": float(value)
            for name, values in zip(names, sets, strict=False)
            for key, value in values.items()
        }
        losses = _from_last_stage(losses)
        iteration = self.args.iteration if self.iteration is None else self.iteration
        if self.display and losses:
            self._write({"iteration": iteration, **losses})
            self.display.note(f"iteration {iteration} | " + " | ".join(f"{k} {v:.4f}" for k, v in losses.items()))

    def close(self) -> None:
        if self.display:
            self.display.close()

    def _write(self, metrics: dict[str, Any]) -> None:
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")


def _from_last_stage(losses: dict[str, float]) -> dict[str, float]:
    """The losses of the last rank, which is on the last pipeline stage, on every rank."""
    if get_args().pipeline_model_parallel_size == 1:
        return losses
    box = [losses]
    torch.distributed.broadcast_object_list(box, src=torch.distributed.get_world_size() - 1)
    return box[0]
