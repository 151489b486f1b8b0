"""Several pieces of Megatron's work in one process, one after another: each start of Megatron takes 10 s.

    [torchrun --nproc-per-node 2] tests/checkpoint/batch.py tasks.json

tasks.json is a list of [name, arguments]: the tasks of megatron_txssm/checkpoint/worker.py, and those below.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# A function's name and its arguments.
Task = tuple[str, dict[str, Any]]


def run_batch(tasks: list[Task], folder: Path, world_size: int | None = None) -> None:
    """Run tasks in a process of their own, or each of them on `world_size` ranks of torchrun."""
    file = folder / f"tasks_{time.monotonic_ns()}.json"
    file.write_text(json.dumps(tasks, default=str))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"] if world_size else []
    command = [sys.executable, *launcher, __file__, str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def train(recipe: str) -> None:
    """A whole run as `txssm pretrain` has it, without its logs."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_txssm.platform import prepare_platform
    from megatron_txssm.recipe.loader import load_recipe
    from megatron_txssm.recipe.megatron_args import megatron_arguments
    from megatron_txssm.training.forward_step import datasets_provider, forward_step
    from megatron_txssm.training.pretrain import describe_checkpoints_at_saves, initialize_arguments, model_config

    loaded, save = load_recipe(recipe), training.save_checkpoint
    args = initialize_arguments([*megatron_arguments(loaded), *prepare_platform()])
    if args.rank == 0:
        describe_checkpoints_at_saves(loaded)
    config = pretrain_cfg_container_from_args(args, model_config(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    training.save_checkpoint = save


def megatron_gradients(checkpoints: str, step: int, tokens: list[int], out: str) -> None:
    """Of the mean loss over `tokens`, by the parameter's name in the checkpoint, padding and all."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from safetensors.torch import save_file

    from megatron_txssm.checkpoint.load import load_model
    from megatron_txssm.checkpoint.worker import _WITHOUT_DATA

    loaded = load_model(Path(checkpoints), _WITHOUT_DATA, step=step)
    tokens_BL = torch.tensor([tokens])
    logits_BLV = loaded.model(tokens_BL, torch.arange(len(tokens))[None], None)
    vocab_size = loaded.recipe.data.vocab_size
    torch.nn.functional.cross_entropy(logits_BLV[0, :-1, :vocab_size], tokens_BL[0, 1:]).backward()
    owners = {parameter.data_ptr(): parameter for parameter in loaded.model.parameters()}
    whole: dict[str, torch.Tensor] = {}
    for entry in nested_values(loaded.model.sharded_state_dict()):
        data = getattr(entry, "data", None)
        if not isinstance(data, torch.Tensor) or data.data_ptr() not in owners:
            continue
        entry.data = owners[data.data_ptr()].grad
        for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            assert isinstance(shard, ShardedTensor) and shard.data is not None
            place = tuple(
                slice(start, start + size) for start, size in zip(shard.global_offset, shard.local_shape, strict=True)
            )
            whole.setdefault(shard.key, torch.full(shard.global_shape, torch.nan))[place] = shard.data
    save_file(whole, out)


def main(file: str) -> None:
    import torch

    torch.set_num_threads(1)
    from megatron_txssm.platform import prepare_platform

    prepare_platform()
    from megatron.training import training

    from megatron_txssm.checkpoint import worker
    from megatron_txssm.compat import mend_megatron

    mend_megatron()
    tasks = worker.TASKS | {task.__name__: task for task in (train, megatron_gradients)}
    for name, arguments in json.loads(Path(file).read_text()):
        tasks[name](**arguments)
        training.destroy_global_state()


if __name__ == "__main__":
    main(sys.argv[1])
