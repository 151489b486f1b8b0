"""Which format can hold which model, and each reason why not."""

import pytest

from megatron_txssm.convert.formats.format import Format, choose_format, refusal
from megatron_txssm.errors import UserError
from tests.convert.formats.test_mapping import VARIANTS, load


@pytest.mark.parametrize(
    ("format", "variant", "changes", "reason"),
    [
        ("llama", "transxssm", "", "it has state-space layers"),
        ("llama", "llama3", "attention_position_encoding=none", "its attention has no rotary positions"),
        ("llama", "llama3", "rotary_table_precision=fp64", "its rotary angles are computed in fp64"),
        ("llama", "llama3", "layer_pattern=*-*E num_experts=4", "it has layers of experts"),
        (
            "granitemoehybrid",
            "jamba with experts",
            "layer_pattern=MEM-*E",
            "some of its blocks have experts and others an FFN, where this class has the same in every block",
        ),
        (
            "granitemoehybrid",
            "jamba with experts",
            "moe_shared_expert_intermediate_size=null",
            "its blocks have no shared expert (moe_shared_expert_intermediate_size), which this class always has",
        ),
        ("reference", "reference", "layer_pattern=M-ME num_experts=4", "it has layers of experts"),
        ("granitemoehybrid", "llama3", "", "it has no state-space layers"),
        ("granitemoehybrid", "transxssm", "", "its state-space layers have no convolution and no skip D"),
        ("granitemoehybrid", "jamba", "state_gated=false", "its state-space layers have no gate"),
        ("granitemoehybrid", "jamba", "state_dt_bias=false", "its dt has no bias"),
        ("granitemoehybrid", "jamba", "length_scaling_base=16", "it scales C by the position (length_scaling_base)"),
        ("granitemoehybrid", "jamba", "state_num_heads=6", "its state-space heads are no multiple of hidden_size"),
        (
            "granitemoehybrid",
            "jamba",
            "attention_position_encoding=rope rotary_table_precision=fp64",
            "its rotary angles are computed in fp64",
        ),
        ("reference", "llama3", "", "it has no state-space layers"),
        ("reference", "reference", "layer_pattern=M-*-M-*-", "its attention layers are others than every eighth"),
        ("reference", "reference", "position_encoding=a_t", "its state-space layers have position_encoding: a_t"),
        ("reference", "reference", "attention_position_encoding=none", "its attention has no rotary positions"),
        ("reference", "reference", "state_size=16", "state_size=16 is not hidden_size / num_attention_heads=8"),
        ("reference", "reference", "kv_channels=16", "kv_channels=16 is not hidden_size / num_attention_heads=8"),
        ("reference", "reference", "state_num_groups=2", "its 6 heads share 2 groups"),
        ("reference", "reference", "num_query_groups=2", "its attention has grouped queries"),
        ("reference", "reference", "state_gated=true", "its state-space layers have a gate"),
        ("reference", "reference", "state_dt_bias=true", "its dt has a bias (train with model.state_dt_bias: false)"),
        ("reference", "reference", "length_scaling_base=16", "it scales C by the position (length_scaling_base)"),
        (
            "reference",
            "reference",
            "rope_scaling=linear rotary_interpolation_factor=2",
            "it has rope_scaling: linear",
        ),
        ("reference", "reference", "rotary_table_precision=fp64", "its rotary angles are computed in fp64"),
        ("reference", "reference", "tie_embeddings=false", "its LM head is not tied to the embedding"),
    ],
)
def test_a_misfit_is_named(format: Format, variant: str, changes: str, reason: str) -> None:
    recipe = load(variant, changes)
    assert refusal(recipe, format) == reason
    with pytest.raises(UserError) as refused:
        choose_format(recipe, format)
    assert str(refused.value) == f"--layout {format} cannot hold {recipe.name}: {reason}; leave --layout out"


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_is_chosen_where_it_fits(variant: str) -> None:
    assert choose_format(load(variant), None) == ("llama" if variant == "llama3" else "transxssm")


@pytest.mark.parametrize("ablation", ["no_residual", "no_norm"])
def test_a_model_without_residuals_or_norms_has_no_format(ablation: str) -> None:
    recipe = load("transxssm", f"ablation={ablation}")
    for asked in (None, "transxssm", "reference"):
        with pytest.raises(UserError, match=f"model.ablation={ablation}, for which there is no Hugging Face format"):
            choose_format(recipe, asked)
    assert choose_format(recipe, "megatron") == "megatron"
