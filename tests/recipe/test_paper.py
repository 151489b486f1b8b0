"""The paper's numbers (arXiv:2506.09507, table 4 and appendix B.1) in the recipes of its models."""

import pytest

from megatron_txssm.architecture.parameters import count_parameters
from megatron_txssm.recipe.changes import changed, differences
from megatron_txssm.recipe.loader import load_recipe
from megatron_txssm.recipe.paper import LAYERS, POSITIONS, TABLE_4, stated_fields
from megatron_txssm.recipe.validation.validate import validate
from megatron_txssm.session.arguments import megatron_arguments, parse_megatron_arguments

OWN_DATA = ("data.train=a", "data.validation=a", "data.tokenizer_model=b")
EVERY_MODEL = [(architecture, scale) for scale in TABLE_4 for architecture in LAYERS]
# The baselines after the literature, and the paper's model of the same scale that each stands beside.
AFTER_THE_LITERATURE = {
    "mamba2_320m_no_ffn": "mamba2_320m",
    "jamba_320m_offset4": "jamba_320m",
    "llama3_320m_gqa": "llama3_320m",
}


@pytest.mark.parametrize(("architecture", "scale"), EVERY_MODEL)
def test_a_model_of_the_paper_has_its_numbers(architecture: str, scale: str) -> None:
    recipe = load_recipe(f"{architecture}_{scale}")
    assert differences([recipe, changed(recipe, stated_fields(architecture, scale))]) == {}
    assert recipe.layers == LAYERS[architecture]
    # SmolLM-Corpus, as SmolLM-1 weighs its subsets.
    assert recipe.data.weights == {"fineweb-edu-dedup": 0.75, "cosmopedia-v2": 0.16, "python-edu": 0.09}


@pytest.mark.parametrize(("architecture", "scale"), EVERY_MODEL)
def test_megatron_trains_a_model_of_the_paper_by_its_numbers(architecture: str, scale: str) -> None:
    recipe = load_recipe(f"{architecture}_{scale}", OWN_DATA)
    args = parse_megatron_arguments(megatron_arguments(recipe))
    table = TABLE_4[scale]
    peak = table["optimizer.learning_rate"]
    assert (args.hidden_size, args.num_attention_heads) == (
        table["model.hidden_size"],
        table["model.num_attention_heads"],
    )
    assert args.lr == peak and args.min_lr == pytest.approx(peak / 10)
    assert args.global_batch_size * args.seq_length == table["training.global_batch_tokens"]
    assert (args.lr_warmup_fraction, args.lr_decay_style, args.lr_decay_iters) == (0.1, "cosine", None)
    assert (args.optimizer, args.adam_beta1, args.adam_beta2) == ("adam", 0.9, 0.999)
    assert (args.weight_decay, args.clip_grad) == (0.01, 1.0)
    assert args.normalization == "RMSNorm" and not args.add_bias_linear and args.swiglu
    assert args.hybrid_layer_pattern == LAYERS[architecture]
    positions = POSITIONS[architecture]
    if "M" in LAYERS[architecture]:
        assert (args.mamba_state_dim, args.ssd_chunk_size, args.mamba_head_dim) == (128, 256, 64)
        assert args.position_encoding == positions["model.position_encoding"]
        assert args.state_space_gated is positions["model.state_gated"]
    if "*" in LAYERS[architecture]:
        assert args.position_embedding_type == positions["model.attention_position_encoding"]
    # GPT-NeoX-20B's tokens.
    assert args.vocab_size == 50277


@pytest.mark.parametrize(("name", "beside"), AFTER_THE_LITERATURE.items())
def test_a_baseline_after_the_literature_trains_as_the_one_beside_it(name: str, beside: str) -> None:
    recipe, other = load_recipe(name), load_recipe(beside)
    found = differences([recipe, other], but=("name", "description"))
    assert found and all(field.startswith("model.") for field in found)
    sizes = [count_parameters(each.sizes).total for each in (recipe, other)]
    assert max(sizes) <= 1.02 * min(sizes)


def test_the_baselines_after_the_literature_are_what_they_are_called() -> None:
    mamba, jamba, llama = map(load_recipe, AFTER_THE_LITERATURE)
    # Expand 2, one group, no FFN (arXiv:2405.21060, section 7 and figure 6).
    assert set(mamba.layers) == {"M"} and mamba.state_space is not None
    assert mamba.state_space.num_heads * mamba.state_space.head_dim == 2 * mamba.model.hidden_size
    assert (mamba.state_space.num_groups, mamba.state_space.gated) == (1, True)
    assert [index % 8 for index, mixer in enumerate(jamba.blocks) if mixer == "*"] == [4, 4, 4]
    assert (llama.model.rotary_base, llama.model.num_attention_heads) == (
        500_000,
        4 * (llama.model.num_query_groups or 0),
    )


@pytest.mark.parametrize(("scale", "tokens"), [("320m", 6.4e9), ("1.3b", 26e9)])
def test_training_takes_twenty_tokens_a_parameter(scale: str, tokens: float) -> None:
    for architecture in LAYERS:
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
