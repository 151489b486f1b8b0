"""The paper's numbers (arXiv:2506.09507, table 4 and appendix B.1) in the recipes of its models."""

import pytest

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.session.arguments import megatron_arguments, parse_megatron_arguments

OWN_DATA = ("data.train=a", "data.validation=a", "data.tokenizer_model=b")
ARCHITECTURES = ("transxssm", "llama3", "mamba2", "jamba")
# Width, heads, peak learning rate, tokens per step.
SCALES = {"320m": (768, 12, 3e-4, 2**20), "1.3b": (2048, 32, 2e-4, 2**21)}
# Layers, mixer of the state-space layers, attention's position encoding, gate of a state-space layer.
KINDS = {
    "transxssm": ("M-M-M-M-M-M-M-*-" * 3, "rope", "rope", False),
    "llama3": ("*-" * 24, None, "rope", None),
    "mamba2": ("M-" * 24, "conv1d_d", None, True),
    "jamba": ("M-M-M-M-M-M-M-*-" * 3, "conv1d_d", "none", True),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_of_the_paper_trains_by_its_numbers(architecture: str, scale: str) -> None:
    recipe = load_recipe(f"{architecture}_{scale}", OWN_DATA)
    args = parse_megatron_arguments(megatron_arguments(recipe))
    width, heads, peak, batch_tokens = SCALES[scale]
    assert (args.hidden_size, args.num_attention_heads) == (width, heads)
    assert args.lr == peak and args.min_lr == pytest.approx(peak / 10)
    assert args.global_batch_size * args.seq_length == batch_tokens
    assert (args.lr_warmup_fraction, args.lr_decay_style, args.lr_decay_iters) == (0.1, "cosine", None)
    assert (args.optimizer, args.adam_beta1, args.adam_beta2) == ("adam", 0.9, 0.999)
    assert (args.weight_decay, args.clip_grad) == (0.01, 1.0)
    assert args.normalization == "RMSNorm" and not args.add_bias_linear and args.swiglu
    pattern, encoding, attention_encoding, gated = KINDS[architecture]
    assert args.hybrid_layer_pattern == pattern
    if "M" in pattern:
        assert (args.mamba_state_dim, args.ssd_chunk_size, args.mamba_head_dim) == (128, 256, 64)
        assert (args.position_encoding, args.state_space_gated) == (encoding, gated)
    if "*" in pattern:
        assert args.position_embedding_type == attention_encoding
    # GPT-NeoX-20B's tokens, and SmolLM-Corpus as SmolLM-1 weighs its subsets.
    assert args.vocab_size == 50277
    assert load_recipe(f"{architecture}_{scale}").data.weights == {
        "fineweb-edu-dedup": 0.75,
        "cosmopedia-v2": 0.16,
        "python-edu": 0.09,
    }


@pytest.mark.parametrize(("scale", "tokens"), [("320m", 6.4e9), ("1.3b", 26e9)])
def test_training_takes_twenty_tokens_a_parameter(scale: str, tokens: float) -> None:
    for architecture in ARCHITECTURES:
        training = load_recipe(f"{architecture}_{scale}").training
        assert (training.train_tokens, training.seq_length, training.precision) == (tokens, 4096, "bf16")


@pytest.mark.parametrize(
    ("scale", "width", "heads", "blocks", "peak"), [("7b", 4096, 32, 32, 3e-4), ("70b", 8192, 64, 80, 1.5e-4)]
)
@pytest.mark.parametrize("architecture", ["transxssm", "llama3"])
def test_the_large_models_have_llamas_sizes_and_schedule(
    architecture: str, scale: str, width: int, heads: int, blocks: int, peak: float
) -> None:
    """arXiv:2407.21783, table 3; batch, warm-up and optimizer of arXiv:2307.09288, section 2.2."""
    recipe = load_recipe(f"{architecture}_{scale}", OWN_DATA)
    args = parse_megatron_arguments(megatron_arguments(recipe))
    assert (args.hidden_size, args.num_attention_heads, args.num_query_groups) == (width, heads, 8)
    assert (args.ffn_hidden_size, args.rotary_base, args.seq_length) == (3.5 * width, 500_000, 8192)
    assert len(recipe.layers) == 2 * blocks and recipe.layers.count("*") == (
        blocks if "llama" in architecture else blocks // 8
    )
    assert (args.lr, args.adam_beta2, args.weight_decay, args.clip_grad) == (peak, 0.95, 0.1, 1.0)
    assert args.lr_warmup_fraction * args.train_iters == pytest.approx(2000, rel=0.001)
    assert args.global_batch_size * args.seq_length == 2**22
    tokens = 20 * count_parameters(recipe.sizes).total
    assert recipe.training.train_tokens == pytest.approx(tokens, rel=0.01)


# Nodes of eight GPUs, the fewest and many.
@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        *((f"{architecture}_7b", count) for architecture in ("transxssm", "llama3") for count in (1, 128)),
        *((f"{architecture}_70b", count) for architecture in ("transxssm", "llama3") for count in (4, 512)),
        ("transxssm_7b_moe", 1),
        ("transxssm_7b_moe", 32),
        ("transxssm_52b_moe", 4),
        ("transxssm_52b_moe", 128),
    ],
)
def test_a_large_model_fits_whole_nodes(name: str, nodes: int) -> None:
    validate(load_recipe(name), world_size=8 * nodes)


def test_what_a_recipe_need_not_state_has_the_papers_value_or_megatrons() -> None:
    """Fields that no recipe in the repository states: their defaults are the paper's values."""
    args = parse_megatron_arguments(megatron_arguments(load_recipe("transxssm_320m", OWN_DATA)))
    assert (args.rotary_base, args.rotary_seq_len_interpolation_factor, args.rotary_table_precision) == (
        10_000,
        None,
        "fp32",
    )
    assert (args.init_method_std, args.layernorm_epsilon, args.adam_eps) == (0.02, 1e-5, 1e-8)
    assert (args.length_scaling_base, args.state_space_no_dt_bias, args.kv_channels) == (None, False, None)
    assert (args.attention_dropout, args.hidden_dropout, args.seed) == (0.0, 0.0, 1234)


def test_checkpoints_load_at_any_layout() -> None:
    args = parse_megatron_arguments(megatron_arguments(load_recipe("transxssm_320m", OWN_DATA)))
    assert (args.ckpt_format, args.dist_ckpt_optim_fully_reshardable) == ("torch_dist", True)
    assert args.exit_signal_handler
