"""The paper's facts (arXiv:2506.09507), by the recipe fields that state them; tests hold the recipes to them."""

from typing import NamedTuple

from megatron_txssm.recipe.changes import Changes

# Table 4, by scale; the same for all architectures. "1M tokens" and "2M tokens" are read as powers of two.
TABLE_4: dict[str, Changes] = {
    "320m": {
        "model.hidden_size": 768,
        "model.num_attention_heads": 12,
        "model.state_size": 128,
        "model.chunk_size": 256,
        "optimizer.learning_rate": 3e-4,
        "training.global_batch_tokens": 2**20,
    },
    "1.3b": {
        "model.hidden_size": 2048,
        "model.num_attention_heads": 32,
        "model.state_size": 128,
        "model.chunk_size": 256,
        "optimizer.learning_rate": 2e-4,
        "training.global_batch_tokens": 2**21,
    },
}
# Appendix B.1.
TRAINING: Changes = {
    "optimizer.name": "adam",
    "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.999,
    "optimizer.weight_decay": 0.01,
    "optimizer.warmup_fraction": 0.1,
    "optimizer.decay_style": "cosine",
    "optimizer.min_learning_rate_ratio": 0.1,
}
# Section 3 and figure 3: 24 mixers (table 4), each with an FFN; all layers as one string (Recipe.layers).
LAYERS = {
    "transxssm": "M-M-M-M-M-M-M-*-" * 3,
    "llama3": "*-" * 24,
    "mamba2": "M-" * 24,
    "jamba": "M-M-M-M-M-M-M-*-" * 3,
}
# What the architectures are beyond their layers: positions, and the gate of Mamba-2's mixers.
POSITIONS: dict[str, Changes] = {
    "transxssm": {
        "model.position_encoding": "rope",
        "model.attention_position_encoding": "rope",
        "model.state_gated": False,
    },
    "llama3": {"model.attention_position_encoding": "rope"},
    "mamba2": {"model.position_encoding": "conv1d_d", "model.state_gated": True},
    "jamba": {
        "model.position_encoding": "conv1d_d",
        "model.attention_position_encoding": "none",
        "model.state_gated": True,
    },
}


def stated_fields(architecture: str, scale: str) -> Changes:
    """All fields that the paper states of one of its models, such as "jamba" at "1.3b"."""
    return TABLE_4[scale] | TRAINING | POSITIONS[architecture]


class Measured(NamedTuple):
    """A cell of table 2."""

    perplexity: float
    steps_per_second: float


# Table 2, by the names of `txssm study position-encoding`: d_model 256, 8,192 tokens, 8,000 steps.
TABLE_2 = {
    "attention_rope": Measured(8.38, 6.8),
    "state_space_conv1d_d": Measured(8.56, 7.6),
    "state_space_a_t": Measured(8.62, 9.4),
    "state_space_rope": Measured(8.33, 9.2),
    "hybrid_conv1d_d": Measured(8.48, 7.2),
    "hybrid_a_t": Measured(8.56, 8.5),
    "hybrid_rope": Measured(8.18, 8.4),
}
TABLE_2_SIZES: Changes = {"model.hidden_size": 256, "training.seq_length": 8192, "training.train_iters": 8000}

# Figure 4, 1.3B, 4,096 tokens: throughput of TransXSSM divided by Llama 3's.
FIGURE_4 = {"training": 1.423, "inference": 1.295}
