"""Many pieces of Megatron's work in one process, and in ranks that it forks: its imports take longer than any of them.

    tests/convert/batch.py batches.json

batches.json is a list of [number of ranks, [[name, arguments], ...]]: the tasks of
megatron_txssm/convert/proof/worker.py and those below.
"""

import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# What the tasks import, and takes its time.
IMPORTED_ONCE = (
    *("megatron.training", "megatron.core.tokenizers.text", "megatron.training.argument_utils", "transformers"),
    *("sentencepiece", "megatron_txssm.model.layer_specs", "megatron_txssm.training.forward_step"),
)
# A function's name and its arguments.
Task = tuple[str, dict[str, Any]]
# How many ranks do each of these, one after another.
Batch = tuple[int, list[Task]]


def run_batches(batches: list[Batch], folder: Path) -> None:
    file = folder / f"batches_{time.monotonic_ns()}.json"
    file.write_text(json.dumps(batches, default=str))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def train(recipe: str) -> None:
    """A whole run as `txssm pretrain` has it, without its logs."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_txssm.platform import prepare_platform
    from megatron_txssm.recipe.loader import load_recipe
    from megatron_txssm.session.arguments import megatron_arguments
    from megatron_txssm.session.hooks import Call, Listener, listening
    from megatron_txssm.session.start import initialize_arguments, model_config
    from megatron_txssm.training.forward_step import datasets_provider, forward_step
    from megatron_txssm.training.saving import describe_checkpoints

    class Description(Listener):
        def before_save(self, call: Call) -> None:
            if args.rank == 0:
                describe_checkpoints(loaded)

    loaded = load_recipe(recipe)
    args = initialize_arguments([*megatron_arguments(loaded), *prepare_platform()])
    config = pretrain_cfg_container_from_args(args, model_config(args))
    with listening(Description()):
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)


def megatron_gradients(checkpoints: str, step: int, tokens: list[int], out: str) -> None:
    """Of the mean loss over `tokens`, by the parameter's name in the checkpoint, padding and all."""
    import torch
    from safetensors.torch import save_file

    from megatron_txssm.checkpoint.load import WEIGHTS_ONLY, load_model
    from megatron_txssm.model.shards import model_shards, place_of

    loaded = load_model(Path(checkpoints), WEIGHTS_ONLY, step=step)
    tokens_BL = torch.tensor([tokens])
    logits_BLV = loaded.model(tokens_BL, torch.arange(len(tokens))[None], None)
    vocab_size = loaded.recipe.data.vocab_size
    torch.nn.functional.cross_entropy(logits_BLV[0, :-1, :vocab_size], tokens_BL[0, 1:]).backward()
    gradients = {parameter.data_ptr(): parameter.grad for parameter in loaded.model.parameters()}
    whole: dict[str, torch.Tensor] = {}
    for shard in model_shards(loaded.model, instead=lambda tensor: gradients.get(tensor.data_ptr())):
        assert shard.data is not None
        whole.setdefault(shard.key, torch.full(shard.global_shape, torch.nan))[place_of(shard)] = shard.data
    save_file(whole, out)


def main(file: str) -> None:
    import torch.multiprocessing

    torch.set_num_threads(1)
    from megatron_txssm.platform import prepare_platform

    prepare_platform()
    for module in IMPORTED_ONCE:
        importlib.import_module(module)

    from megatron_txssm.compat import mend_megatron

    mend_megatron()
    # Or the collector's marks would copy every page that a rank shares with this process.
    gc.freeze()
    for world_size, tasks in json.loads(Path(file).read_text()):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        torch.multiprocessing.start_processes(be_rank, (world_size, port, tasks), world_size, start_method="fork")


def be_rank(rank: int, world_size: int, port: int, tasks: list[Task]) -> None:
    from megatron.training import training

    from megatron_txssm.convert.proof import worker

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    known = worker.TASKS | {task.__name__: task for task in (train, megatron_gradients)}
    for name, arguments in tasks:
        known[name](**arguments)
        training.destroy_global_state()


if __name__ == "__main__":
    main(sys.argv[1])
