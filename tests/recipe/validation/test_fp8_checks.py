"""FP8 in recipes: rejects settings that would be dropped or have no kernel, checks sizes; recipes fit their GPUs."""

from typing import get_args

import pytest

from megatron_txssm.choices import Fp8Recipe
from megatron_txssm.errors import UserError
from megatron_txssm.recipe.loader import load_recipe, recipe_names
from megatron_txssm.recipe.validation.fp8_checks import check_fp8_on
from megatron_txssm.session.arguments import megatron_arguments, parse_megatron_arguments

H100, B200, ADA, AMPERE, RTX_50 = (9, 0), (10, 0), (8, 9), (8, 0), (12, 0)
# The version that comes with torch 2.13.
CUDNN = (9, 20, 0)
OWN_DATA = ("data.train=a", "data.validation=a", "data.tokenizer_model=b")
EXPERTS = ("model.layer_pattern=ME*E", "model.num_experts=4")
FP8_RECIPES = [name for name in recipe_names() if "_fp8_" in name]


@pytest.mark.parametrize(
    ("name", "overrides", "wanted"),
    [
        ("transxssm_1.3b", ["fp8_attention=true"], "fp8_attention=true has no effect without training.fp8"),
        ("transxssm_1.3b", ["fp8_recipe=mxfp8"], "fp8_recipe=mxfp8 has no effect without training.fp8"),
        ("transxssm_1.3b", ["first_last_layers_bf16=1"], "first_last_layers_bf16=1 has no effect without"),
        ("transxssm_1.3b", ["fp8=hybrid", "precision=fp32"], "fp8=hybrid needs training.precision=bf16, not fp32"),
        ("transxssm_1.3b", ["fp8=e5m2"], "must be one of hybrid, e4m3"),
        (
            "transxssm_1.3b_fp8_h100",
            ["fp8_recipe=blockwise"],
            "fp8_attention=true would be dropped by Megatron with training.fp8_recipe=blockwise",
        ),
        (
            "transxssm_1.3b_fp8_h100",
            ["first_last_layers_bf16=1"],
            "first_last_layers_bf16=1 is not possible with training.fp8_recipe=delayed",
        ),
        (
            "transxssm_1.3b_fp8_b200",
            ["first_last_layers_bf16=24"],
            "first_last_layers_bf16=24 leaves no layer to FP8; use at most 23",
        ),
        ("mamba2_1.3b_fp8_h100", ["fp8_attention=true"], " has no attention; leave it out"),
    ],
)
def test_a_contradiction_names_value_and_remedy(name: str, overrides: list[str], wanted: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(name, [f"training.{override}" for override in overrides])
    assert wanted in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["model.ffn_hidden_size=6008"], "the FFN has 6008 channels; use ffn_hidden_size of 6000 or 6016"),
        ([*EXPERTS, "model.moe_ffn_hidden_size=40"], "an expert has 40 channels; use moe_ffn_hidden_size of 32 or 48"),
        (
            [*EXPERTS, "model.moe_shared_expert_intermediate_size=8"],
            "the shared expert has 8 channels; use moe_shared_expert_intermediate_size of 16",
        ),
        (
            ["model.ffn_hidden_size=6032", "parallel.tensor_model_parallel_size=2"],
            "the FFN has 3016 channels; use ffn_hidden_size of 6016 or 6048",
        ),
        (["model.kv_channels=72", "model.num_attention_heads=31"], "use kv_channels of 64 or 80"),
        # 16 heads plus 2 x 1 group, of 4 channels each.
        (
            ["model.kv_channels=4", "model.num_attention_heads=16", "model.num_query_groups=1"],
            "the projection to Q, K, V has 72 rows",
        ),
        (
            ["training.seq_length=8", "training.micro_batch_size=1"],
            "has 8 tokens; use a seq_length that is a multiple of 16",
        ),
        (
            ["model.state_head_dim=7", "model.state_num_heads=24"],
            "the state space has 168 channels; use state_num_heads of 16 or 32",
        ),
    ],
)
def test_sides_of_gemms_are_multiples_of_sixteen(overrides: list[str], wanted: str) -> None:
    base = ["training.fp8=hybrid", "training.fp8_attention=false"]
    with pytest.raises(UserError) as error:
        load_recipe("transxssm_1.3b", [*base, *overrides])
    assert "needs multiples of 16" in str(error.value) and wanted in str(error.value)


def test_rows_of_the_in_projection_may_be_any() -> None:
    """The mixer pads them: 1804 rows at 320M, and 2064 on each of two ranks at 1.3B, where MXFP8 has blocks of 32."""
    for name, override in (
        ("transxssm_320m", "training.fp8=hybrid"),
        ("transxssm_1.3b_fp8_b200", "parallel.tensor_model_parallel_size=2"),
    ):
        assert load_recipe(name, [override]).training.fp8


def test_emulation_takes_any_size() -> None:
    load_recipe("transxssm_320m", ["training.fp8=hybrid", "training.transformer_impl=local"])


def test_sequence_parallel_ranks_share_the_tokens() -> None:
    layout = ["parallel.tensor_model_parallel_size=2", "training.micro_batch_size=1", "training.seq_length=16"]
    load_recipe("transxssm_1.3b_fp8_h100", layout)
    with pytest.raises(UserError, match="a micro-batch has 8 tokens; use a seq_length that is a multiple of 32"):
        load_recipe("transxssm_1.3b_fp8_h100", [*layout, "parallel.sequence_parallel=true"])


def test_packed_documents_have_no_fp8_attention() -> None:
    with pytest.raises(UserError, match=r"does not work with data\.isolate_documents=true"):
        load_recipe("transxssm_1.3b_fp8_h100", ["data.isolate_documents=true"])
    load_recipe("transxssm_1.3b_fp8_h100", ["data.isolate_documents=true", "training.fp8_attention=false"])


def test_context_parallel_ranks_share_the_tokens() -> None:
    layout = ["parallel.context_parallel_size=2", "training.micro_batch_size=1"]
    load_recipe("transxssm_1.3b_fp8_h100", layout)
    short = ["training.seq_length=16", "model.chunk_size=4"]
    with pytest.raises(UserError, match="a micro-batch has 8 tokens; use a seq_length that is a multiple of 32"):
        load_recipe("transxssm_1.3b_fp8_h100", [*layout, *short])


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_each_recipe_suits_the_gpu_of_its_name(name: str) -> None:
    check_fp8_on(load_recipe(name), H100 if name.endswith("h100") else B200, CUDNN)


def test_there_is_a_recipe_for_each_architecture() -> None:
    architectures = {name.split("_")[0] for name in FP8_RECIPES if name.endswith("_h100")}
    assert architectures == {"transxssm", "llama3", "mamba2", "jamba"}


@pytest.mark.parametrize(
    ("name", "overrides", "gpu", "wanted"),
    [
        ("transxssm_1.3b_fp8_h100", [], AMPERE, "needs compute capability 8.9 or more, .*8.0.*; set training.fp8=null"),
        ("transxssm_1.3b_fp8_h100", [], ADA, "it has no FP8 attention"),
        ("transxssm_1.3b_fp8_h100", [], RTX_50, "it has no FP8 attention"),
        ("transxssm_1.3b_fp8_h100", ["training.fp8_recipe=tensorwise"], H100, "has FP8 attention from Blackwell on"),
        ("transxssm_1.3b_fp8_h100", ["model.num_attention_heads=32"], H100, "of 128 channels, not 64; .*heads=16"),
        ("transxssm_1.3b_fp8_b200", [], H100, "mxfp8 needs compute capability 10.0"),
        ("transxssm_1.3b_fp8_b200", [], RTX_50, "has no GEMM in all layouts"),
        ("transxssm_1.3b_fp8_b200", ["training.fp8_attention=true"], B200, "needs cuDNN 9.21 or newer .*not 9.20.0"),
        ("mamba2_1.3b_fp8_h100", ["training.fp8_recipe=blockwise"], ADA, "blockwise needs compute capability 9.0"),
    ],
)
def test_what_a_gpu_has_no_kernel_for_is_refused(
    name: str, overrides: list[str], gpu: tuple[int, int], wanted: str
) -> None:
    recipe = load_recipe(name, overrides)
    with pytest.raises(UserError, match=wanted):
        check_fp8_on(recipe, gpu, CUDNN)
    # Emulation does not depend on the GPU.
    check_fp8_on(load_recipe(name, [*overrides, "training.transformer_impl=local"]), gpu, CUDNN)


def test_each_way_of_scaling_states_its_oldest_cudnn() -> None:
    attention = ["training.fp8_attention=true", "training.fp8_recipe=tensorwise"]
    recipe = load_recipe("transxssm_1.3b_fp8_b200", attention)
    check_fp8_on(recipe, B200, (9, 14, 0))
    with pytest.raises(UserError, match=r"tensorwise needs cuDNN 9\.14 or newer for it, not 9\.13\.1"):
        check_fp8_on(recipe, B200, (9, 13, 1))


def test_other_pairs_of_recipe_and_gpu_work() -> None:
    for override in ("training.fp8_recipe=tensorwise", "model.num_attention_heads=32"):
        check_fp8_on(load_recipe("transxssm_1.3b_fp8_h100", [override]), B200, CUDNN)
    mxfp8 = load_recipe("transxssm_1.3b_fp8_b200", ["training.fp8_attention=true"])
    check_fp8_on(mxfp8, B200, (9, 21, 0))
    ends = ["training.fp8_recipe=tensorwise", "training.fp8_attention=false", "training.first_last_layers_bf16=2"]
    check_fp8_on(load_recipe("transxssm_1.3b_fp8_h100", ends), ADA, CUDNN)
    check_fp8_on(load_recipe("transxssm_1.3b"), AMPERE, CUDNN)


def test_an_environment_variable_may_not_change_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_DPA_FP8_RECIPE", "F16")
    with pytest.raises(UserError, match="NVTE_DPA_FP8_RECIPE would override"):
        check_fp8_on(load_recipe("transxssm_1.3b_fp8_h100"), H100, CUDNN)


def test_megatron_gets_the_settings() -> None:
    args = parse_megatron_arguments(megatron_arguments(load_recipe("transxssm_1.3b_fp8_h100", OWN_DATA)))
    assert (args.fp8, args.fp8_recipe, args.fp8_dot_product_attention) == ("hybrid", "delayed", True)
    assert (args.fp8_amax_history_len, args.fp8_amax_compute_algo) == (1024, "max")
    assert not args.first_last_layers_bf16
    ends = ["training.first_last_layers_bf16=2", *OWN_DATA]
    args = parse_megatron_arguments(megatron_arguments(load_recipe("transxssm_1.3b_fp8_b200", ends)))
    assert (args.fp8, args.fp8_recipe, args.fp8_dot_product_attention) == ("e4m3", "mxfp8", False)
    assert args.first_last_layers_bf16
    assert (args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16) == (2, 2)
    plain = parse_megatron_arguments(megatron_arguments(load_recipe("transxssm_1.3b", OWN_DATA)))
    assert (plain.fp8, plain.fp8_dot_product_attention) == (None, False)


@pytest.mark.parametrize("flag", ["fp8_recipe", "fp8", "first_last_layers_bf16", "fp8_dot_product_attention"])
def test_the_megatron_section_cannot_contradict(flag: str) -> None:
    with pytest.raises(UserError, match=f"megatron.{flag}=.*: set training"):
        megatron_arguments(load_recipe("transxssm_1.3b_fp8_h100", [*OWN_DATA, f"megatron.{flag}=true"]))


def test_the_scales_of_all_recipes_are_known() -> None:
    for way in get_args(Fp8Recipe):
        overrides = ["training.fp8=hybrid", f"training.fp8_recipe={way}"]
        check_fp8_on(load_recipe("transxssm_1.3b", overrides), B200, CUDNN)
