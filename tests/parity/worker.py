"""One rank of several runs of Megatron's own loop, one after another: each step's loss and full gradients go to files.

    torchrun --nproc-per-node 2 tests/parity/worker.py cases.json

A case is {"out": folder, "arguments": Megatron's}. Runs share a process, since its imports take longer than a run.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def main(cases_file: str) -> None:
    torch.set_num_threads(1)
    from megatron_txssm.platform import prepare_platform

    platform_arguments = prepare_platform()
    from megatron.training import training

    from megatron_txssm.compat import mend_megatron

    mend_megatron()
    for case in json.loads(Path(cases_file).read_text()):
        run(Path(case["out"]), [*case["arguments"], *platform_arguments])
        training.destroy_global_state()


def run(out: Path, arguments: list[str]) -> None:
    """One run; writes losses.json and, before each optimizer step, gradients_STEP_RANK.pt into `out`."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_txssm.training.forward_step import datasets_provider, forward_step
    from megatron_txssm.training.pretrain import initialize_arguments, model_config

    args = initialize_arguments(arguments)
    setup, log = training.setup_model_and_optimizer, training.training_log
    losses: dict[int, float] = {}

    def setup_and_watch(*setup_args: Any, **kwargs: Any) -> Any:
        models, optimizer, schedule = setup(*setup_args, **kwargs)
        assert optimizer is not None
        step = optimizer.step

        def dump_and_step() -> Any:
            dump_gradients(out / f"gradients_{args.curr_iteration + 1}_{args.rank}.pt", models)
            return step()

        optimizer.step = dump_and_step
        return models, optimizer, schedule

    def log_and_keep(loss_dict: Any, total: Any, learning_rate: Any, iteration: int, *rest: Any, **kwargs: Any) -> Any:
        if loss_dict:
            losses[iteration] = float(loss_dict["lm loss"])
        return log(loss_dict, total, learning_rate, iteration, *rest, **kwargs)

    training.setup_model_and_optimizer, training.training_log = setup_and_watch, log_and_keep
    try:
        config = pretrain_cfg_container_from_args(args, model_config(args))
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    except SystemExit as stop:  # --exit-interval
        assert stop.code in (0, None), stop.code
    finally:
        training.setup_model_and_optimizer, training.training_log = setup, log
    if args.rank == args.world_size - 1:
        (out / "losses.json").write_text(json.dumps(losses))


def dump_gradients(path: Path, models: list[Any]) -> None:
    """This rank's gradients as (name in the checkpoint, global shape, global offset, tensor), whatever the layout."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    shards = []
    for model in models:
        fetch_reduced_shards(model)
        owners = {parameter.data_ptr(): parameter for parameter in model.parameters()}
        for entry in nested_values(model.module.sharded_state_dict()):
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                continue
            tensor: Any = entry.data
            if tensor.data_ptr() in owners:
                entry.data = owners[tensor.data_ptr()].main_grad
                pieces: Any = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
                shards += [(p.key, tuple(p.global_shape), tuple(p.global_offset), p.data.clone()) for p in pieces]
    torch.save(shards, path)


def fetch_reduced_shards(model: Any) -> None:
    """Under ZeRO-1 a rank holds the reduced gradient of its own shard only: fetch the others'."""
    for buffer in model.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets if group.size() > 1 else []:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)


if __name__ == "__main__":
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    main(sys.argv[1])
