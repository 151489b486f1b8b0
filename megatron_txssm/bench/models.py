"""What `txssm bench throughput` compares: the paper's four models at one size, Llama 3 also with slow attention."""

from dataclasses import dataclass, field

from megatron_txssm.architecture.flops import FORWARD_AND_BACKWARD, flops_per_token
from megatron_txssm.recipe.changes import Changes, changed
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.recipe import Recipe
from megatron_txssm.recipe.sizes import of_equal_size

# What is measured, in the order of the figure's panels.
TRAINING, PREFILL, DECODING = PARTS = ("training", "prefill", "decoding")
REFERENCE = "transxssm"


@dataclass(frozen=True)
class Entrant:
    """A model of the comparison: the recipe of an architecture, and how its attention is computed."""

    architecture: str
    parts: tuple[str, ...] = PARTS
    # All scores as a matrix, softmax of it; otherwise a fused kernel.
    materialised: bool = False
    # transformers' StaticCache; otherwise the model's own, for Llama DynamicCache, which copies all keys at each token.
    static_cache: bool = False


ENTRANTS = {
    REFERENCE: Entrant("transxssm"),
    "llama3": Entrant("llama3"),
    "llama3_materialised": Entrant("llama3", (TRAINING, PREFILL), materialised=True),
    "llama3_static_cache": Entrant("llama3", (DECODING,), static_cache=True),
    "mamba2": Entrant("mamba2"),
    "jamba": Entrant("jamba"),
}


@dataclass(frozen=True)
class Preset:
    """Sizes and defaults. Every step has as many tokens, so that lengths can be compared, too."""

    # Suffix of the recipes.
    scale: str
    micro_batch_tokens: int
    micro_batches: int
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    turns: int
    # Timed in each turn.
    steps: int
    tokens: int
    changes: Changes = field(default_factory=dict)


_SMALL: Changes = {
    "model.hidden_size": 256,
    "model.num_attention_heads": 4,
    "model.state_num_groups": 1,
    "model.ffn_hidden_size": 1408,
    # Small, as all models share it.
    "data.vocab_size": 4096,
    "megatron.overlap_grad_reduce": None,
    "megatron.overlap_param_gather": None,
    "parallel.use_distributed_optimizer": False,
}
_LENGTHS, _CONTEXTS = (1024, 2048, 4096, 8192, 16384), (4096, 16384, 65536)
PRESETS = {
    "small": Preset("320m", 4096, 1, _LENGTHS[:3], _CONTEXTS[:2], turns=2, steps=3, tokens=64, changes=_SMALL),
    "320m": Preset("320m", 16384, 2, _LENGTHS, _CONTEXTS, turns=3, steps=6, tokens=64),
    "1.3b": Preset("1.3b", 8192, 2, _LENGTHS, _CONTEXTS, turns=3, steps=6, tokens=64),
}


def recipe_of(architecture: str, preset: Preset, length: int) -> Recipe:
    """An architecture's recipe at the preset's size, for samples of `length` tokens, unchecked."""
    samples = max(1, preset.micro_batch_tokens // length)
    batch: Changes = {
        "training.seq_length": length,
        "training.micro_batch_size": samples,
        "training.global_batch_tokens": preset.micro_batches * samples * length,
    }
    return changed(_sized(architecture, preset), batch)


def _sized(architecture: str, preset: Preset) -> Recipe:
    recipe = load_recipe(f"{architecture}_{preset.scale}")
    if not preset.changes:
        return recipe
    # One module, of the first's parameters.
    own = changed(recipe, preset.changes | {"model.layer_pattern": recipe.layers[: len(recipe.layers) // 3]})
    return own if architecture == REFERENCE else of_equal_size(own, _sized(REFERENCE, preset))


def model_flops(recipe: Recipe, part: str, length: int) -> float:
    """Model FLOPs per token of a step, of a prefill, or of decoding one token after `length` others."""
    if part == TRAINING:
        return flops_per_token(recipe.sizes, length)
    if part == PREFILL:
        # Only the last token's logits are computed.
        head = 2.0 * recipe.model.hidden_size * recipe.data.vocab_size
        return flops_per_token(recipe.sizes, length) / FORWARD_AND_BACKWARD - head
    # A scan of one token is the recurrence; one token attends to all others, which in training half of them do.
    recurrent = changed(recipe, {"model.chunk_size": 1})
    return flops_per_token(recurrent.sizes, 2 * length) / FORWARD_AND_BACKWARD


def score_bytes(recipe: Recipe, part: str, length: int) -> int:
    """Bytes of all scores of the attention layers, which training keeps, and a prefill one layer at a time."""
    samples, layers = (recipe.training.micro_batch_size, recipe.layers.count("*")) if part == TRAINING else (1, 1)
    width = 2 if recipe.training.precision == "bf16" else 4
    return samples * layers * recipe.model.num_attention_heads * length**2 * width


def cache_bytes(recipe: Recipe, length: int) -> int:
    """Bytes of the keys and values of `length` tokens."""
    width = 2 if recipe.training.precision == "bf16" else 4
    groups = recipe.model.num_query_groups or recipe.model.num_attention_heads
    return 2 * recipe.layers.count("*") * groups * recipe.kv_channels * length * width
