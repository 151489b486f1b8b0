"""Tiny checkpoints, trained for two steps: four architectures at four parallel layouts, and some more.

Each of the four meets every combination of a tied or an own LM head with a padded or an unpadded vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_txssm.recipe.changes import Changes
from tests.data.corpus_fixture import corpus_of, make_corpus, random_documents
from tests.support.megatron_tasks import Task, run_tasks
from tests.support.megatron_tasks import train as train_recipe
from tests.support.recipes import write_recipe

_TWO_STEPS: Changes = {
    "training.global_batch_tokens": 256,
    "training.train_iters": 2,
    "optimizer.learning_rate": 1e-2,
    "data.make_vocab_size_divisible_by": 16,
    "checkpoint.save_interval": 2,
    "megatron.num_workers": 0,
}
MODEL = {
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "state_head_dim": 8,
    # Large, so that every layer's part in the logits is.
    "init_method_std": 0.1,
    # Not what any class takes by itself, and large enough to show in the logits.
    "norm_epsilon": 1e-3,
    "rotary_base": 500,
}
_MAMBA2 = {"position_encoding": "conv1d_d", "state_gated": True, "attention_position_encoding": "none"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # A proof's 512 tokens go beyond the base.
    "transxssm": {"layer_pattern": "M-M-M-*-", "length_scaling_base": 100},
    # Twice as wide inside.
    "mamba2": {"layer_pattern": "M-M-M-M-", "state_num_heads": 8, **_MAMBA2},
    # Under muP, twice as wide as its base.
    "jamba": {"layer_pattern": "M-*-M-*-", "mup_base_hidden_size": 16, **_MAMBA2},
    # Heads wider than hidden_size / num_attention_heads; and sizes that no state-space layer could have.
    "llama3": {"layer_pattern": "*-*-*-*-", "kv_channels": 16, "state_head_dim": 64},
}
_EXPERTS = {"num_experts": 6, "moe_router_topk": 3, "moe_ffn_hidden_size": 24}
EXPERT_ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Some blocks with an FFN and some with experts, none with a shared one.
    "experts": {"layer_pattern": "M-ME*EME", **_EXPERTS},
    "jamba_experts": {
        "layer_pattern": "ME*EMEME",
        **_MAMBA2,
        **_EXPERTS,
        "moe_shared_expert_intermediate_size": 16,
    },
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
_EP2 = {"expert_model_parallel_size": 2}
# Of models with experts; not each at each layout.
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "experts_ep2": (2, {**_EP2, "use_distributed_optimizer": True}),
    "experts_tp2pp2": LAYOUTS["tp2pp2"],
    "jamba_experts_tp1": LAYOUTS["tp1"],
    "jamba_experts_pp2ep2": (4, {**_PP2, **_EP2}),
}
# (tied, size): 301 becomes 304 rows.
VOCABULARIES = [(True, 301), (False, 301), (True, 304), (False, 304)]
# What the authors' public code is (arXiv:2506.09507): no grouped B, C, K or V, square heads, no bias of dt.
REFERENCE = {
    "layer_pattern": "M-M-M-M-M-M-M-*-",
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
        sections = {"model": MODEL | self.model, "parallel": self.parallel}
        stated = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
        corpus = corpus_of(self.folder / "corpus", self.vocab_size)
        write_recipe(self.recipe, _TWO_STEPS, corpus, {"name": self.name, **stated}, run=self.run)


def matrix(folder: Path) -> list[Trained]:
    """Four architectures times four layouts."""
    made: list[Trained] = []
    for a, (architecture, model) in enumerate(ARCHITECTURES.items()):
        for b, (layout, (world_size, parallel)) in enumerate(LAYOUTS.items()):
            tied, vocab_size = VOCABULARIES[(a + b) % 4]
            name = f"{architecture}_{layout}"
            made.append(Trained(name, folder, world_size, model | {"tie_embeddings": tied}, parallel, vocab_size))
    return made


def with_experts(folder: Path) -> list[Trained]:
    made: list[Trained] = []
    for n, (name, (world_size, parallel)) in enumerate(EXPERT_LAYOUTS.items()):
        tied, vocab_size = VOCABULARIES[n]
        model = EXPERT_ARCHITECTURES[name.rpartition("_")[0]] | {"tie_embeddings": tied}
        made.append(Trained(name, folder, world_size, model, parallel, vocab_size))
    return made


def reference(folder: Path) -> Trained:
    return Trained("reference", folder, 1, REFERENCE, {}, 301)


def train(models: Sequence[Trained], folder: Path) -> None:
    """Train each on one corpus in `folder`."""
    make_corpus(folder / "corpus", {"web": [random_documents(40, seed=0)]})
    by_size: dict[int, list[Task]] = {}
    for model in models:
        model.write_recipe()
        by_size.setdefault(model.world_size, []).append((train_recipe, {"recipe": model.recipe}))
    for world_size, tasks in by_size.items():
        run_tasks(world_size, tasks, folder / f"trained_on_{world_size}")
