"""Tiny checkpoints, trained for two steps: four architectures at four parallel layouts, and one in the authors' shape.

Each architecture meets every combination of a tied or an own LM head with a padded or an unpadded vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.convert.batch import Task, run_batches
from tests.data.corpus_fixture import make_corpus, random_documents

RECIPE = """\
name: {name}
description: a tiny model
run_directory: {folder}/{name}
model: {model}
parallel: {parallel}
training:
  seq_length: 32
  micro_batch_size: 2
  global_batch_tokens: 256
  train_iters: 2
  precision: fp32
  transformer_impl: local
optimizer: {{learning_rate: 1e-2}}
data:
  corpus: {folder}/corpus
  vocab_size: {vocab_size}
  make_vocab_size_divisible_by: 16
checkpoint: {{save_interval: 2}}
logging: {{log_interval: 1, eval_iters: 0, tensorboard: false}}
megatron: {{num_workers: 0}}
"""

_MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "state_size": 16,
    "state_head_dim": 8,
    "state_num_groups": 2,
    "chunk_size": 16,
    # Large, so that every layer's part in the logits is.
    "init_method_std": 0.1,
    # Not what any class takes by itself, and large enough to show in the logits.
    "norm_epsilon": 1e-3,
    "rotary_base": 500,
}
_MAMBA2 = {"position_encoding": "conv1d_d", "state_gated": True, "attention_position_encoding": "none"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # A proof's 512 tokens go beyond the base.
    "transxssm": {"layer_pattern": "SSSA", "length_scaling_base": 100},
    # Twice as wide inside.
    "mamba2": {"layer_pattern": "S", "state_num_heads": 8, **_MAMBA2},
    "jamba": {"layer_pattern": "SA", **_MAMBA2},
    # Heads wider than hidden_size / num_attention_heads; and sizes that no state-space layer could have.
    "llama3": {"layer_pattern": "A", "kv_channels": 16, "state_head_dim": 64},
}
_PP2 = {"pipeline_model_parallel_size": 2}
_TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# Name -> processes, settings.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {**_TP2, "use_distributed_optimizer": True}),
    "pp2vpp2": (2, {**_PP2, "virtual_pipeline_stages": 2}),
    "tp2pp2": (4, {**_TP2, **_PP2}),
}
# (tied, size): 301 becomes 304 rows.
VOCABULARIES = [(True, 301), (False, 301), (True, 304), (False, 304)]
# What the authors' public code is (arXiv:2506.09507): no grouped B, C, K or V, square heads, no bias of dt.
REFERENCE = {
    "num_layers": 8,
    "layer_pattern": "SSSSSSSA",
    "num_query_groups": None,
    "state_size": 8,
    "state_num_groups": 4,
    "state_dt_bias": False,
}


@dataclass(frozen=True)
class Trained:
    """A recipe and, once it has run, its checkpoint of step 2."""

    name: str
    folder: Path
    world_size: int
    model: dict[str, Any]
    parallel: dict[str, Any]
    vocab_size: int

    @property
    def run(self) -> Path:
        return self.folder / self.name

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def recipe(self) -> Path:
        return self.folder / f"{self.name}.yaml"

    def write_recipe(self) -> None:
        values = vars(self) | {"model": json.dumps(_MODEL | self.model), "parallel": json.dumps(self.parallel)}
        self.recipe.write_text(RECIPE.format(**values))


def matrix(folder: Path) -> list[Trained]:
    """Four architectures times four layouts."""
    made: list[Trained] = []
    for a, (architecture, model) in enumerate(ARCHITECTURES.items()):
        for b, (layout, (world_size, parallel)) in enumerate(LAYOUTS.items()):
            tied, vocab_size = VOCABULARIES[(a + b) % 4]
            name = f"{architecture}_{layout}"
            made.append(Trained(name, folder, world_size, model | {"tie_embeddings": tied}, parallel, vocab_size))
    return made


def reference(folder: Path) -> Trained:
    return Trained("reference", folder, 1, REFERENCE, {}, 301)


def train(models: Sequence[Trained], folder: Path) -> None:
    """Train each on one corpus in `folder`."""
    make_corpus(folder / "corpus", {"web": [random_documents(40, seed=0)]})
    by_size: dict[int, list[Task]] = {}
    for model in models:
        model.write_recipe()
        by_size.setdefault(model.world_size, []).append(("train", {"recipe": model.recipe}))
    run_batches(list(by_size.items()), folder)
