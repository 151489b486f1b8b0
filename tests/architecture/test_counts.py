"""Parameter counts and FLOPs of the recipes, without torch."""

import math
from argparse import Namespace

import pytest

from megatron_txssm.architecture.flops import flops_per_token
from megatron_txssm.architecture.layer_pattern import EXPERTS, STATE_SPACE, layers
from megatron_txssm.architecture.parameters import ExpertSizes, ModelSizes, count_parameters
from megatron_txssm.model.arguments import state_space_config
from megatron_txssm.recipe.loader import load_recipe

ARCHITECTURES = ("transxssm", "llama3", "mamba2", "jamba")
# Instead of a corpus, which would have to exist.
OWN_DATA = ("data.train=a", "data.validation=a", "data.tokenizer_model=b")


@pytest.mark.parametrize(("scale", "target"), [("320m", 320e6), ("1.3b", 1.3e9)])
def test_the_four_models_of_a_scale_are_of_one_size(scale: str, target: float) -> None:
    totals = [count_parameters(load_recipe(f"{name}_{scale}").sizes).total for name in ARCHITECTURES]
    assert max(totals) <= 1.02 * min(totals)
    assert all(abs(total / target - 1) <= 0.05 for total in totals)


@pytest.mark.parametrize(("scale", "target"), [("7b", 7.4e9), ("70b", 69.3e9)])
def test_the_large_models_are_of_llamas_size(scale: str, target: float) -> None:
    """Llama 3 8B and 70B, less the words of its vocabulary that this tokenizer lacks."""
    totals = [count_parameters(load_recipe(f"{name}_{scale}").sizes).total for name in ("transxssm", "llama3")]
    assert max(totals) <= 1.01 * min(totals)
    assert totals == pytest.approx([target] * 2, rel=0.01)


def test_the_active_experts_of_7b_compute_as_much_as_a_model_of_1_3b() -> None:
    count = count_parameters(load_recipe("transxssm_7b_moe").sizes)
    assert 7e9 < count.total < 7.5e9 and 1.3e9 < count.active < 1.6e9


def test_the_model_of_52b_has_jambas_size() -> None:
    """52B parameters, 12B active (arXiv:2403.19887), of which its mixers and vocabulary have 2B more."""
    count = count_parameters(load_recipe("transxssm_52b_moe").sizes)
    assert 49e9 < count.total < 53e9 and 10e9 < count.active < 12e9


def test_counts_of_a_model_small_enough_for_the_margin() -> None:
    recipe = load_recipe(
        "demo_cpu",
        [
            "model.layer_pattern=M-*-",
            "model.hidden_size=8",
            "model.ffn_hidden_size=12",
            "model.num_attention_heads=4",
            "model.num_query_groups=2",
            "model.state_head_dim=4",
            "model.state_size=6",
            "model.state_num_groups=2",
            "data.vocab_size=100",
        ],
    )
    count = count_parameters(recipe.sizes)
    assert count.embedding == 128 * 8
    assert count.output == 0
    # Q and output 8x8, K and V 8x4.
    assert count.attention == 2 * 64 + 2 * 32
    # x 8, B and C 2x6 each, dt 2; output 8x8; A_log and dt_bias.
    assert count.state_space == 8 * (8 + 12 + 12 + 2) + 64 + 4
    assert count.ffn == 2 * 3 * 8 * 12
    assert count.norms == 5 * 8
    assert count.total == sum((1024, 192, 340, 576, 40))


def test_a_token_uses_some_of_the_experts() -> None:
    sizes = [f"model.{text}" for text in ("layer_pattern=ME-E", "hidden_size=8", "ffn_hidden_size=12")]
    experts = ["num_experts=5", "moe_router_topk=3", "moe_ffn_hidden_size=4", "moe_shared_expert_intermediate_size=8"]
    own = load_recipe("demo_cpu", [*sizes, "model.state_head_dim=4", *(f"model.{text}" for text in experts)])
    count = count_parameters(own.sizes)
    # Router, experts, the shared one; two layers of them.
    assert count.experts == 2 * (5 * 8 + 5 * 3 * 8 * 4 + 3 * 8 * 8)
    assert count.ffn == 3 * 8 * 12
    assert count.total - count.active == count.inactive == 2 * 2 * 3 * 8 * 4
    # As large as an FFN, and none shared.
    plain = load_recipe("demo_cpu", [*sizes, "model.state_head_dim=4", "model.num_experts=5"])
    assert count_parameters(plain.sizes).experts == 2 * (5 * 8 + 5 * 3 * 8 * 12)
    assert count_parameters(plain.sizes).inactive == 2 * 3 * 3 * 8 * 12


@pytest.mark.parametrize("name", ["transxssm_320m", "demo_cpu"])
def test_a_recipe_with_experts_computes_as_much_as_the_one_without(name: str) -> None:
    dense, experts = (load_recipe(found) for found in (name, f"{name}_moe"))
    assert experts.layers == dense.layers.replace("-", "E")
    count, dense_count = count_parameters(experts.sizes), count_parameters(dense.sizes)
    assert dense_count.active == dense_count.total
    assert abs(count.active / dense_count.total - 1) < 0.01 and count.total > 2 * dense_count.total
    length = dense.training.seq_length
    assert abs(flops_per_token(experts.sizes, length) / flops_per_token(dense.sizes, length) - 1) < 0.01


def test_an_untied_head_counts_twice() -> None:
    recipe = load_recipe("llama3_320m", ["model.tie_embeddings=false"])
    assert count_parameters(recipe.sizes).output == 50304 * 768


def sizes_of(args: Namespace) -> ModelSizes:
    """Sizes from Megatron's arguments."""
    all_layers = layers(args.hybrid_layer_pattern)
    return ModelSizes(
        layers=all_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels or args.hidden_size // args.num_attention_heads,
        vocab_size=args.padded_vocab_size,
        tie_embeddings=not args.untie_embeddings_and_output_weights,
        state_space=state_space_config(args) if STATE_SPACE in all_layers else None,
        experts=ExpertSizes(
            num_experts=args.num_experts,
            topk=args.moe_router_topk,
            ffn_hidden_size=args.moe_ffn_hidden_size,
            shared_ffn_hidden_size=args.moe_shared_expert_intermediate_size or 0,
        )
        if EXPERTS in all_layers
        else None,
    )


def test_sizes_from_megatrons_arguments_are_those_of_the_recipe() -> None:
    from megatron_txssm.session.arguments import megatron_arguments, parse_megatron_arguments

    experts = ("model.layer_pattern=ME*E", "model.num_experts=4")
    recipes = [
        *((name, ()) for name in ("transxssm_320m", "llama3_1.3b", "mamba2_320m", "demo_cpu", "transxssm_320m_moe")),
        ("transxssm_320m", experts),
    ]
    for name, changes in recipes:
        recipe = load_recipe(name, [*OWN_DATA, *changes])
        args = parse_megatron_arguments(megatron_arguments(recipe))
        assert sizes_of(args) == recipe.sizes


def test_flops_grow_with_the_length_only_through_attention() -> None:
    llama, mamba = load_recipe("llama3_320m"), load_recipe("mamba2_320m")
    assert flops_per_token(mamba.sizes, 4096) == flops_per_token(mamba.sizes, 65536)
    # 24 layers x 12 heads x 64 channels; 6 per token and position of the causal half, twice.
    assert flops_per_token(llama.sizes, 8192) - flops_per_token(llama.sizes, 4096) == 6 * 4096 * 24 * 768


def test_attention_of_the_depths_meets_documents_too() -> None:
    """A mean document of 64 instead of 256 tokens, in the model's layer of attention and in those of two depths."""
    changes = ["model.layer_pattern=M-*-/*-/*-", "training.seq_length=256"]
    sizes = load_recipe("demo_cpu", changes).sizes
    whole, divided = flops_per_token(sizes, 256), flops_per_token(sizes, 256, document_length=64)
    width = sizes.num_attention_heads * sizes.kv_channels
    assert whole - divided == 3 * 6 * (256 - 64) * width
    assert flops_per_token(sizes, 256, document_length=256) == whole


def test_flops_of_a_scan_count_the_causal_half_of_a_chunk() -> None:
    """By hand, for transxssm_320m's mixer: 12 heads of 64, state 128, 4 groups, chunks of 256; from 768 channels."""
    sizes = load_recipe("transxssm_320m").state_space
    assert sizes is not None
    # A reader pairs with 1 to 256 sources of its chunk; as for attention, half a chunk counts.
    sources = 256 / 2
    scores, values = 2 * sources * 4 * 128, 2 * sources * 768
    written = read = 2 * 768 * 128
    scan = scores + values + written + read
    assert scan == 720896
    # x, B, C, dt, and the out-projection.
    projections = 2 * 768 * (768 + 512 + 512 + 12) + 2 * 768 * 768
    assert sizes.flops_per_token(4096) == 3 * (projections + scan)
    # A sequence shorter than a chunk.
    assert sizes.flops_per_token(64) == 3 * (projections + 2 * 32 * (4 * 128 + 768) + written + read)


@pytest.mark.parametrize("name", ["llama3_320m", "transxssm_1.3b", "transxssm_320m_moe"])
def test_flops_are_six_per_weight_and_token_besides_scores_and_scan(name: str) -> None:
    recipe = load_recipe(name)
    count = count_parameters(recipe.sizes)
    weights = 6 * (count.active - count.norms)
    # Scans and attention scores add to it, norm weights do not; short sequences keep both small.
    assert weights < flops_per_token(recipe.sizes, 64) < 1.05 * weights


def test_llama_agrees_with_megatrons_own_count() -> None:
    from megatron.training.training import num_floating_point_operations

    from megatron_txssm.session.arguments import megatron_arguments, parse_megatron_arguments

    recipe = load_recipe("llama3_320m", OWN_DATA)
    args = parse_megatron_arguments(megatron_arguments(recipe))
    args.kv_channels = recipe.kv_channels
    megatrons = num_floating_point_operations(args, batch_size=1) / args.seq_length
    assert math.isclose(flops_per_token(recipe.sizes, args.seq_length), megatrons, rel_tol=1e-3)
