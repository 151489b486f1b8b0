"""Imports moved or private names of Megatron, and patches its faults; for optimizers'
state: compat_optimizers.py; for checkpoint saves: checkpoint/compat_saves.py.

Checked against megatron-core 0.19.2 (tests/test_compat.py); start here when upgrading Megatron.
"""

import argparse
import atexit
import functools
import gc
import queue
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron.training
import torch
from megatron.core.ssm.utils import _split_tensor_factory as split_tensor_factory
from torch.distributed.distributed_c10d import _world

from megatron_txssm.compat_optimizers import ParameterGroup, mend_optimizers

__all__ = [
    "MegatronArguments",
    "forget_training",
    "get_args",
    "mend_megatron",
    "replace_tensorboard_writer",
    "split_tensor_factory",
]

type MegatronArguments = argparse.Namespace

_mended = False


def get_args() -> MegatronArguments:
    """Megatron's global arguments. Megatron's own function is untyped, and its variable starts as None."""
    return megatron.training.get_args()  # pyright: ignore[reportReturnType]


def replace_tensorboard_writer(replace: Callable[[Any], Any]) -> None:
    """Put `replace(Megatron's TensorBoard writer, or None)` in its place; None: Megatron reports to none."""
    from megatron.training import global_vars

    global_vars._GLOBAL_TENSORBOARD_WRITER = replace(global_vars.get_tensorboard_writer())


def forget_training() -> None:
    """Clear Megatron's global state and process groups, so that this process can train another model."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.training import training

    training.destroy_global_state()
    # Sums by layer, which have as many entries as the model has layers or depths.
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()
    if torch.distributed.is_initialized():
        # Megatron leaves them, and gloo's threads look for messages a hundred times a second.
        for group in [group for group in _world.pg_map if group is not torch.distributed.group.WORLD]:
            torch.distributed.destroy_process_group(group)
    # Hooks and kept activations refer to the models out of the garbage collector's sight.
    for model in [thing for thing in gc.get_objects() if type(thing) is DistributedDataParallel]:
        for module in list(model.modules()):
            vars(module).clear()
    gc.collect()


def mend_megatron() -> None:
    """Patch, once per process, the faults of Megatron 0.19.2 that affect every platform."""
    global _mended
    if _mended:
        return
    _mended = True
    _use_compiled_dataset_helpers()
    mend_optimizers()
    _collect_save_results_in_rank()
    # At every save Megatron collects garbage, now without a look at all that was imported: a third of a second each.
    gc.freeze()
    atexit.register(_unfreeze_for_triton)
    _resume_under_another_schedule()
    _continue_schedules()
    _log_load_balance_on_every_stage()
    _share_the_head_with_prediction_depths()


def _use_compiled_dataset_helpers() -> None:
    """The wheel ships the compiled index builder without its Makefile; Megatron still runs `make` and exits."""
    import megatron.core.datasets.utils as utils

    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


def _unfreeze_for_triton() -> None:
    """Let Triton 3.9 free its objects at the end of Python: it counts them (nanobind's), and would list what is left.

    It delays the end of a process (by 1.2 to 1.6 s on a loaded machine), so versions that do not count go without.
    """
    library = sys.modules.get("triton._C.libtriton")
    if library is not None and any(type(value).__module__ == "nanobind" for value in vars(library).values()):
        gc.unfreeze()


def _collect_save_results_in_rank() -> None:
    """A synchronous save hands its results over within the rank.

    Megatron sends them through another process, which imports torch to read them: seconds of each rank's first save.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    writer: Any = filesystem_async
    save = TorchDistSaveShardedStrategy.save

    @functools.wraps(save)
    def save_in_rank(*args: Any, **kwargs: Any) -> None:
        between_processes = writer.get_write_results_queue
        writer.get_write_results_queue = queue.SimpleQueue
        try:
            save(*args, **kwargs)
        finally:
            writer.get_write_results_queue = between_processes

    setattr(TorchDistSaveShardedStrategy, "save", save_in_rank)


def _resume_under_another_schedule() -> None:
    """Under --override-opt-param-scheduler, a run resumes with another learning rate or other settings of Adam.

    Megatron refuses it regardless: it matches saved parameter groups to the run's by their learning rates, and the
    saved settings replace the run's. Here groups that differ only in their rates are matched, and keep this run's.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    for optimizer in (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer):
        setattr(optimizer, "load_state_dict", _with_this_runs_settings(optimizer.load_state_dict))


def _with_this_runs_settings(load: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load)
    def wrapped(self: Any, state_dict: dict[str, Any]) -> None:
        if get_args().override_opt_param_scheduler and not self.is_stub_optimizer:
            saved = state_dict.get("optimizer", state_dict)["param_groups"]
            for ours, theirs in _pairs_of_groups(self.optimizer.param_groups, saved):
                theirs.update({key: value for key, value in ours.items() if key not in ("params", "step")})
        load(self, state_dict)

    return wrapped


def _pairs_of_groups(
    ours: list[ParameterGroup], theirs: list[ParameterGroup]
) -> Iterator[tuple[ParameterGroup, ParameterGroup]]:
    """Pairs of groups that differ only in their schedule; if there are several, in order of learning rate."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    schedule = ("max_lr", "min_lr", "start_wd", "end_wd")
    kinds: dict[tuple[object, ...], tuple[list[ParameterGroup], list[ParameterGroup]]] = defaultdict(lambda: ([], []))
    for side, groups in enumerate((ours, theirs)):
        for group in groups:
            kind = (
                *(group.get(key) for key in param_group_identifier_keys if key not in schedule),
                group.get("default_config"),
            )
            kinds[kind][side].append(group)
    for pair in kinds.values():
        # Megatron reports groups that one side lacks.
        yield from zip(*(sorted(side, key=lambda group: group["max_lr"]) for side in pair), strict=False)


def _continue_schedules() -> None:
    """The first step after a resume has this run's weight decay, and its number in steps of this run's batch.

    Megatron's schedule counts samples: after steps with fewer samples, the run would end before its schedule does.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import checkpointing

    load, check = OptimizerParamScheduler.load_state_dict, checkpointing.check_checkpoint_args
    saved_batch = 0

    # Called before the schedule is loaded.
    @functools.wraps(check)
    def check_and_note(checkpoint_args: MegatronArguments, *args: Any, **kwargs: Any) -> None:
        nonlocal saved_batch
        check(checkpoint_args, *args, **kwargs)
        saved_batch = checkpoint_args.global_batch_size

    @functools.wraps(load)
    def load_and_set(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        if saved_batch:
            self.num_steps = self.num_steps // saved_batch * get_args().global_batch_size
        self.step(0)

    setattr(checkpointing, "check_checkpoint_args", check_and_note)
    setattr(OptimizerParamScheduler, "load_state_dict", load_and_set)


def _log_load_balance_on_every_stage() -> None:
    """The experts' load balance is summed over pipeline stages and over tensor- and context-parallel processes.

    For the first sum, stages with experts have an entry for each layer of a hybrid model, the others one for each layer
    of experts: the sizes must agree. The second sum is left out by stages without experts, which may be the last one,
    whose value is logged.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

    ensure = MoEMetricsTracker.ensure_initialized

    @functools.wraps(ensure)
    def ensure_all_layers(self: Any, name: str, num_layers: int, *args: Any, **kwargs: Any) -> None:
        if name not in self.metrics:
            depths = get_args().mtp_num_layers or 0
            ensure(self, name, get_args().num_layers + depths, *args, **kwargs)
            self.metrics[name].reduce_group = parallel_state.get_tensor_and_context_parallel_group()

    setattr(MoEMetricsTracker, "ensure_initialized", ensure_all_layers)
    count = MoEMetricsTracker._count_moe_layers

    def count_once(num_layers: int | None, moe_layer_freq: Any, mtp_num_layers: int | None) -> int:
        # The number of a hybrid model's layers of experts includes those of its depths; Megatron adds the depths.
        return count(num_layers, moe_layer_freq, None)

    setattr(MoEMetricsTracker, "_count_moe_layers", staticmethod(count_once))


def _share_the_head_with_prediction_depths() -> None:
    """A last pipeline stage with prediction depths has no LM head of its own if the model's is the embedding.

    The depths' copy of the embedding serves as the head; Megatron's HybridModel has an unused second weight beside it,
    and then refuses to save.
    """
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    build = HybridModel.__init__

    @functools.wraps(build)
    def build_without_second_head(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if self.mtp_process and self.share_embeddings_and_output_weights:
            self.output_layer.weight = None

    setattr(HybridModel, "__init__", build_without_second_head)
