"""The tests' recipe, from which every tiny run and checkpoint derives: two layers on a few tokens, a second of work."""

from pathlib import Path
from typing import Any

from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.schema import Checkpoint, Data, Logging, Model, Optimizer, Parallel, Training

TINY = Recipe(
    name="tiny",
    model=Model(
        layer_pattern="M-*-",
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
        state_size=16,
        state_head_dim=16,
        state_num_groups=2,
        chunk_size=16,
    ),
    parallel=Parallel(),
    training=Training(
        seq_length=32,
        micro_batch_size=2,
        global_batch_tokens=128,
        train_iters=20,
        precision="fp32",
        transformer_impl="local",
    ),
    optimizer=Optimizer(learning_rate=1e-3),
    data=Data(vocab_size=64, make_vocab_size_divisible_by=4),
    checkpoint=Checkpoint(),
    logging=Logging(log_interval=1, eval_iters=0, tensorboard=False),
)
# Four mixers, updated by a distributed optimizer.
FOUR_LAYERS: Changes = {
    "model.layer_pattern": "M-M-M-*-",
    "model.state_head_dim": 8,
    "parallel.use_distributed_optimizer": True,
    "training.micro_batch_size": 1,
}


def write_recipe(path: Path, *changes: Changes, run: Path) -> Path:
    """Write TINY with `changes`, of which later ones win, as the recipe of a run in the folder `run`."""
    merged: dict[str, Any] = {"run_directory": str(run)}
    for part in changes:
        merged |= part
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(changed(TINY, merged).to_yaml())
    return path


def tokens_of(prefix: Path) -> Changes:
    """A tenth of the documents under `prefix`, made by `tests.parity.harness.write_tokens`, are for validation."""
    return {
        "data.blend": ((1.0, str(prefix)),),
        "data.split": "90,10,0",
        "data.tokenizer_type": "NullTokenizer",
        "data.make_vocab_size_divisible_by": 16,
    }
