"""Parameter names of today's models and of those whose layers were a mixer and its FFN."""

import pytest

from megatron_txssm.architecture.former_names import former_name

LAYERS = "M-*-M-"


@pytest.mark.parametrize(
    ("present", "former"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("output_layer.weight", "output_layer.weight"),
        ("decoder.final_norm.weight", "decoder.final_layernorm.weight"),
        (
            "decoder.layers.0.mixer.in_proj.layer_norm_weight",
            "decoder.layers.0.self_attention.in_proj.layer_norm_weight",
        ),
        ("decoder.layers.0.mixer.in_proj.weight.x", "decoder.layers.0.self_attention.in_proj.weight.x"),
        ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc1.weight"),
        ("decoder.layers.2.self_attention.linear_qkv.weight", "decoder.layers.1.self_attention.linear_qkv.weight"),
        ("decoder.layers.3.mlp.linear_fc2.weight", "decoder.layers.1.mlp.linear_fc2.weight"),
        ("decoder.layers.4.mixer.A_log", "decoder.layers.2.self_attention.A_log"),
        ("optimizer.state.exp_avg.decoder.final_norm.weight", "optimizer.state.exp_avg.decoder.final_layernorm.weight"),
        (
            "optimizer.state.exp_avg.decoder.layers.4.mixer.dt_bias",
            "optimizer.state.exp_avg.decoder.layers.2.self_attention.dt_bias",
        ),
    ],
)
def test_the_former_name(present: str, former: str) -> None:
    assert former_name(present, LAYERS) == former


def test_layers_have_numbers_of_several_digits() -> None:
    assert former_name("decoder.layers.23.mlp.x", "M-" * 12) == "decoder.layers.11.mlp.x"


@pytest.mark.parametrize("layers", ["M-*-M-", "MM-*", "-M-", "**--M", "---", "M"])
def test_names_stay_distinct(layers: str) -> None:
    """Initial weights are drawn by them: equal names would give equal weights."""
    parts = {"M": "mixer.in_proj.weight", "*": "self_attention.linear_qkv.weight", "-": "mlp.linear_fc1.weight"}
    names = [former_name(f"decoder.layers.{n}.{parts[symbol]}", layers) for n, symbol in enumerate(layers)]
    assert len(set(names)) == len(layers)
