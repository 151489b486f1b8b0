"""One rank of several runs of Megatron's own loop: writes each step's loss and full gradients to files.

    torchrun --nproc-per-node 2 -m megatron_txssm.check.worker tasks.json fp32

A task is {"out": folder, "arguments": Megatron's, "recipe": file or null}; a recipe's arguments come first. A task with
"packings" is one of `txssm check leakage`. Runs share a process, because its imports take longer than a run. `runs.py`
starts the ranks and reads the files.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_txssm.errors import UserError
from megatron_txssm.session.hooks import Call, Listener, listening
from megatron_txssm.slurm.environment import end_with_launcher


def main(tasks_file: str, precision: str) -> None:
    end_with_launcher()
    torch.set_num_threads(1)
    if precision == "fp64":
        from megatron_txssm.check.double import compute_in_double

        compute_in_double()
    from megatron_txssm.platform import prepare_platform

    platform_arguments = prepare_platform()
    from megatron_txssm.check import leakage_worker
    from megatron_txssm.compat import forget_training, mend_megatron

    mend_megatron()
    for task in json.loads(Path(tasks_file).read_text(encoding="utf-8")):
        out = Path(task["out"])
        try:
            arguments = [*_recipe_arguments(task["recipe"]), *task["arguments"], *platform_arguments]
            if "packings" in task:
                leakage_worker.run(out, arguments, task["packings"], task["seed"])
            else:
                run(out, arguments)
        except UserError as error:
            # Rejected on every rank before the first collective, so the next run can use these processes.
            (out / "refused").write_text(str(error), encoding="utf-8")
        except BaseException as error:
            (out / f"failed_{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            raise
        forget_training()


def _recipe_arguments(recipe: str | None) -> list[str]:
    from megatron_txssm.recipe.loader import load_recipe
    from megatron_txssm.session.arguments import megatron_arguments

    return [] if recipe is None else megatron_arguments(load_recipe(recipe))


def run(out: Path, arguments: list[str]) -> None:
    """One run; writes losses.json and, before each optimizer step, gradients_STEP_RANK.pt into `out`."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_txssm.session.start import initialize_arguments, model_config
    from megatron_txssm.training.forward_step import datasets_provider, forward_step

    args = initialize_arguments(arguments)
    recorder = Recorder(out, args)
    config = pretrain_cfg_container_from_args(args, model_config(args))
    try:
        with listening(recorder):
            pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    except SystemExit as stop:  # --exit-interval
        assert stop.code in (0, None), stop.code
    if args.rank == args.world_size - 1:
        # Written atomically: its existence marks the run as complete.
        (out / "losses.partial").write_text(json.dumps(recorder.losses), encoding="utf-8")
        (out / "losses.partial").rename(out / "losses.json")


class Recorder(Listener):
    """Keeps each step's loss, and writes its gradients into `out`."""

    def __init__(self, out: Path, args: Any):
        self.out, self.args = out, args
        # By step.
        self.losses: dict[int, float] = {}

    def after_setup(self, call: Call, made: tuple[list[Any], Any, Any]) -> None:
        models, optimizer, _ = made
        assert optimizer is not None
        step = optimizer.step

        def dump_and_step() -> Any:
            dump_gradients(self.out / f"gradients_{self.args.curr_iteration + 1}_{self.args.rank}.pt", models)
            return step()

        optimizer.step = dump_and_step

    def after_log(self, call: Call, result: Any) -> None:
        if call.loss_dict:
            self.losses[call.iteration] = float(call.loss_dict["lm loss"])


def dump_gradients(path: Path, models: list[Any]) -> None:
    """This rank's gradients as (name in the checkpoint, global shape, global offset, tensor), for any layout."""
    from megatron_txssm.model.shards import model_shards

    shards: list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]] = []
    for model in models:
        if model.ddp_config.use_distributed_optimizer:
            fetch_reduced_shards(model)
        gradients = {parameter.data_ptr(): parameter.main_grad for parameter in model.parameters()}
        for shard in model_shards(model.module, instead=lambda tensor, known=gradients: known.get(tensor.data_ptr())):
            assert shard.data is not None
            piece = shard.data.clone()[(None,) * shard.prepend_axis_num]
            shards.append((shard.key, tuple(shard.global_shape), tuple(shard.global_offset), piece))
    torch.save(shards, path)


def fetch_reduced_shards(model: Any) -> None:
    """Under ZeRO-1, a rank only holds the reduced gradients of its own shard: fetch the others'."""
    for buffer in model.buffers + model.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets if group.size() > 1 else []:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)


if __name__ == "__main__":
    main(*sys.argv[1:])
