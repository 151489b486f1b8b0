"""The block spec: the order of layers, the angles that attention uses, the model that Megatron builds from it."""

import warnings
from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from torch import Tensor

from megatron_txssm.choices import POSITION_ENCODINGS
from megatron_txssm.errors import UserError
from megatron_txssm.model import layer_specs
from megatron_txssm.model.layer_specs import check_ssd_backend, hybrid_block_spec
from megatron_txssm.model.self_attention import UnifiedRotarySelfAttention
from megatron_txssm.model.state_space_mixer import StateSpaceMixer
from megatron_txssm.ops import ssd_triton
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding
from tests.support.tiny_model import (
    HIDDEN,
    VOCABULARY,
    build_hybrid,
    perturb,
    relative_error,
    state_space_config,
    transformer_config,
)

LETTERS = {StateSpaceMixer: "S", UnifiedRotarySelfAttention: "A"}
# No two slices of it are equal.
PATTERN = "SSASAAAS"


def spec_of(config: Any, pattern: str = PATTERN, **stage: Any) -> Any:
    return hybrid_block_spec(config, pattern, state_space_config(), UnifiedRotaryEmbedding(), **stage)


def kinds(config: Any, pattern: str = PATTERN, **stage: Any) -> str:
    layers = spec_of(config, pattern, **stage).layer_specs
    return "".join(LETTERS[layer.submodules.self_attention.module] for layer in layers)


@pytest.mark.parametrize("pattern", ["S", "A", "SA", "SSSSSSSA", PATTERN])
def test_the_pattern_repeats_over_the_layers(one_process: None, pattern: str) -> None:
    assert kinds(transformer_config(num_layers=8), pattern) == pattern * (8 // len(pattern))


def test_pipeline_stages_have_their_slices_of_the_pattern(one_process: None) -> None:
    config = transformer_config(num_layers=8, pipeline_model_parallel_size=2)
    assert [kinds(config, pp_rank=rank) for rank in (0, 1)] == ["SSAS", "AAAS"]


def test_virtual_stages_interleave(one_process: None) -> None:
    config = transformer_config(num_layers=8, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    stages = {(vp, pp): kinds(config, pp_rank=pp, vp_stage=vp) for vp in (0, 1) for pp in (0, 1)}
    assert stages == {(0, 0): "SS", (0, 1): "AS", (1, 0): "AA", (1, 1): "AS"}


def test_an_uneven_layout_is_followed(one_process: None) -> None:
    config = transformer_config(
        num_layers=8, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="Etttttt|ttL"
    )
    assert isinstance(config.pipeline_model_parallel_layout, PipelineParallelLayerLayout)
    assert config.pipeline_model_parallel_layout.get_num_layers_to_build(LayerType.decoder, pp_rank=0) == 6
    assert [kinds(config, pp_rank=rank) for rank in (0, 1)] == ["SSASAA", "AS"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", r"layer_pattern='' must be letters 'S' .* and 'A'"),
        ("SSM", r"layer_pattern='SSM' .*; found 'M'"),
        ("SSA", r"num_layers=8 is not a multiple .* \(3\); use num_layers=6 or write out a pattern of 8 letters"),
    ],
)
def test_pattern_errors_name_value_and_remedy(one_process: None, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kinds(transformer_config(num_layers=8), pattern)


@pytest.mark.parametrize("gpu", [False, True])
def test_kernels_that_cannot_run_are_refused_or_missed(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(ssd_triton, "import_error", lambda: ImportError("No module named 'mamba_ssm'"))
    reason = r"mamba-ssm, which cannot be imported \(No module named 'mamba_ssm'\)" if gpu else "a CUDA device"
    with pytest.raises(UserError, match=rf"ssd_backend=triton cannot run here: it needs {reason}.* auto or torch"):
        check_ssd_backend("triton")
    with warnings.catch_warnings(record=True, action="always") as said:
        check_ssd_backend("torch")
        assert not said
        check_ssd_backend("auto")
    # No warning on a CPU.
    assert len(said) == gpu


@pytest.mark.parametrize(
    ("field", "value", "built"),
    [
        ("normalization", "LayerNorm", "RMSNorm"),
        ("add_bias_linear", True, False),
        ("add_qkv_bias", True, False),
        ("qk_layernorm", True, False),
        ("qk_l2_norm", True, False),
        ("attention_output_gate", True, False),
        ("softmax_type", "learnable", "vanilla"),
        ("window_size", 128, None),
        ("multi_latent_attention", True, False),
        ("experimental_attention_variant", "gated_delta_net", None),
        ("num_moe_experts", 4, None),
        ("mtp_num_layers", 1, None),
        ("rotary_interleaved", True, False),
        ("layernorm_zero_centered_gamma", True, False),
        ("fp32_residual_connection", True, False),
        ("rotary_percent", 0.5, 1.0),
        ("rope_scaling", True, False),
    ],
)
def test_what_the_layers_would_not_follow_is_refused(
    one_process: None, field: str, value: object, built: object
) -> None:
    config = transformer_config(num_layers=8)
    setattr(config, field, value)
    with pytest.raises(UserError, match=rf"{field}={value} is not supported by TransXSSM's layers; use {built}"):
        spec_of(config)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("reset_position_ids", True),
        ("reset_attention_mask", True),
        ("heterogeneous_layers_config_path", "layers.json"),
        ("position_embedding_type", "learned_absolute"),
    ],
)
def test_arguments_that_the_layers_would_not_follow_are_refused(
    monkeypatch: pytest.MonkeyPatch, argument: str, value: object
) -> None:
    args = Namespace(**{"position_embedding_type": "rope"} | {argument: value})
    monkeypatch.setattr(layer_specs, "get_args", lambda: args)
    with pytest.raises(UserError, match=f"{argument}={value} is not supported by TransXSSM's layers"):
        layer_specs.transxssm_block_spec(None)


def test_layers_of_different_kinds_are_saved_one_by_one(one_process: None) -> None:
    config = transformer_config(num_layers=8)
    assert not config.hetereogenous_dist_checkpoint
    spec_of(config)
    assert config.hetereogenous_dist_checkpoint
    keys = {entry.key for entry in build_hybrid("SA").sharded_state_dict().values()}
    assert "decoder.layers.1.self_attention.linear_qkv.weight" in keys
    # As Transformer Engine's modules name it.
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in keys
    assert not any("input_layernorm.weight" in key for key in keys)


def test_attention_turns_by_the_shared_spectrum(one_process: None) -> None:
    """Q and K as core attention gets them, against complex numbers: θ_i = base^(-2i/d), positions over the factor."""
    base, factor, length = 500.0, 4.0, 12
    model = build_hybrid("A", rotary=UnifiedRotaryEmbedding(base=base, interpolation_factor=factor), rotary_base=77)
    attention: Any = model.decoder.layers[0].self_attention
    seen: list[tuple[Tensor, Tensor]] = []
    attention.core_attention.register_forward_pre_hook(
        lambda _, args: seen.append((args[0].double(), args[1].double()))
    )
    x = torch.randn(length, 1, HIDDEN)
    with torch.no_grad():
        attention(x, None, rotary_pos_emb=model.rotary_pos_emb(length))
        attention(x, None, rotary_pos_emb=None)
    half = attention.hidden_size_per_attention_head // 2
    theta = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.exp(1j * torch.arange(length)[:, None] / factor * theta)[:, None, None]
    for turned, plain in zip(*seen, strict=True):
        expected = torch.complex(plain[..., :half], plain[..., half:]) * turns
        assert relative_error(turned, torch.cat([expected.real, expected.imag], dim=-1)) <= 1e-6


def batch(length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(length).expand(2, -1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("pattern", "encoding", "gated"),
    [("A", "rope", False), *((p, e, g) for e in POSITION_ENCODINGS for p, g in (("S", True), ("SSA", False)))],
)
def test_a_model_learns_and_every_parameter_takes_part(
    one_process: None, pattern: str, encoding: str, gated: bool, tied: bool
) -> None:
    model = build_hybrid(
        pattern,
        state_space=state_space_config(position_encoding=encoding, gated=gated),
        share_embeddings_and_output_weights=tied,
    )
    tokens, positions = batch(24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], positions[:, :-1], None, labels=tokens[:, 1:]).mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), f"{name} has no gradient"
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0] < 6


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_no_token_sees_a_later_one(one_process: None, encoding: str) -> None:
    model = build_hybrid("SA", state_space=state_space_config(position_encoding=encoding))
    tokens, positions = batch(20)
    changed = tokens.clone()
    changed[:, 11] = (changed[:, 11] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = (model(t, positions, None) for t in (tokens, changed))
    assert relative_error(after[:, :11], before[:, :11]) <= 1e-6
    assert (after[:, 11:] - before[:, 11:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_the_model_decodes_as_it_reads(one_process: None, encoding: str) -> None:
    """A prompt in two pieces, then token by token, through states and keys, gives the parallel form's logits."""
    model = build_hybrid("SASA", state_space=state_space_config(position_encoding=encoding)).eval()
    perturb(model)
    tokens, positions = batch(20)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=20)
    with torch.inference_mode():
        whole = model(tokens, positions, None)
        for piece in (6, 5, *[1] * 9):
            start, end = context.sequence_len_offset, context.sequence_len_offset + piece
            logits = model(tokens[:, start:end], positions[:, start:end], None, inference_context=context)
            context.sequence_len_offset = end
            assert relative_error(logits[:, -1], whole[:, end - 1]) <= 1e-5, end
