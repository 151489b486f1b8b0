"""The stack spec: the order of layers, the angles that attention uses, the model that Megatron builds from it."""

import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_txssm.choices import POSITION_ENCODINGS
from megatron_txssm.errors import UserError
from megatron_txssm.model import layer_specs
from megatron_txssm.model.layer_specs import LayerSettings, check_ssd_backend
from megatron_txssm.model.self_attention import UnifiedRotarySelfAttention
from megatron_txssm.model.state_space_mixer import StateSpaceMixer
from megatron_txssm.ops import ssd_triton
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding
from megatron_txssm.recipe.changes import Changes, changed
from tests.support.built_model import build_model
from tests.support.ranks import model_parallel, run_ranks
from tests.support.recipes import TINY
from tests.support.tiny_model import (
    HIDDEN,
    VOCABULARY,
    build_hybrid,
    perturb,
    relative_error,
    state_space_config,
    transformer_config,
)

SYMBOLS = {StateSpaceMixer: "M", UnifiedRotarySelfAttention: "*", MLP: "-"}
# No two stages of it are equal.
PATTERN = "M-*-MM|*--M|-*M-|*-"


def built(model: Any) -> str:
    """The symbols of a stage's layers, by what they hold."""
    kinds = []
    for layer in model.decoder.layers:
        held = layer.mixer if isinstance(layer, MambaLayer) else layer.self_attention
        kinds.append(SYMBOLS[type(layer.mlp if isinstance(held, IdentityOp) else held)])
    return "".join(kinds)


@pytest.mark.parametrize("pattern", ["M", "*-", "M-*-", "M-M-M-M-M-M-M-*-", "MM*--"])
def test_each_symbol_is_a_layer(one_process: None, pattern: str) -> None:
    assert built(build_hybrid(pattern)) == pattern


def stages() -> dict[str, str]:
    """This rank's stages: of two, and of two with two virtual stages each."""
    with model_parallel(pipeline=2):
        halves = {"even": built(build_hybrid("M-*-MM"))}
        halves["uneven"] = built(build_hybrid("M-*-M|M"))
    with model_parallel(pipeline=2, virtual=2):
        config = transformer_config(num_layers=16, is_hybrid_model=True, virtual_pipeline_model_parallel_size=2)
        return halves | {f"virtual {stage}": built(build_hybrid(PATTERN, config, vp_stage=stage)) for stage in (0, 1)}


def test_pipeline_stages_have_their_parts_of_the_pattern(tmp_path: Path) -> None:
    first, second = run_ranks(stages, 2, tmp_path)
    assert first == {"even": "M-*", "uneven": "M-*-M", "virtual 0": "M-*-MM", "virtual 1": "-*M-"}
    assert second == {"even": "-MM", "uneven": "M", "virtual 0": "*--M", "virtual 1": "*-"}


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
        ("moe_router_score_function", "sigmoid", "softmax"),
        ("moe_router_pre_softmax", True, False),
        ("moe_router_topk_scaling_factor", 2.0, None),
        ("moe_router_num_groups", 2, None),
        ("moe_router_enable_expert_bias", True, False),
        ("moe_expert_capacity_factor", 1.5, None),
        ("moe_shared_expert_gate", True, False),
        ("moe_latent_size", 8, None),
        ("moe_input_jitter_eps", 0.01, None),
        ("mtp_detach_heads", True, False),
        ("mtp_use_repeated_layer", True, False),
        ("rotary_interleaved", True, False),
        ("layernorm_zero_centered_gamma", True, False),
        ("fp32_residual_connection", True, False),
    ],
)
def test_what_the_layers_would_not_follow_is_refused(
    one_process: None, field: str, value: object, built: object
) -> None:
    config = transformer_config(num_layers=8, is_hybrid_model=True)
    setattr(config, field, value)
    with pytest.raises(UserError, match=rf"{field}={value} is not supported by TransXSSM's layers; use {built}"):
        build_hybrid("M-M-M-*-", config)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("reset_position_ids", True),
        ("reset_attention_mask", True),
        ("rotary_percent", 0.5),
        ("use_rope_scaling", True),
        ("position_embedding_type", "learned_absolute"),
    ],
)
def test_arguments_that_the_layers_would_not_follow_are_refused(
    monkeypatch: pytest.MonkeyPatch, argument: str, value: object
) -> None:
    args = Namespace(**{"position_embedding_type": "rope"} | {argument: value})
    monkeypatch.setattr(layer_specs, "get_args", lambda: args)
    with pytest.raises(UserError, match=f"{argument}={value} is not supported by TransXSSM's layers"):
        LayerSettings.of_arguments()


def test_norms_are_saved_as_transformer_engine_names_them(one_process: None) -> None:
    keys = {entry.key for entry in build_hybrid("M-*-").sharded_state_dict().values()}
    norms = {key.removeprefix("decoder.") for key in keys if key.endswith("norm_weight") or "norm.weight" in key}
    assert norms == {
        "layers.0.mixer.in_proj.layer_norm_weight",
        "layers.1.mlp.linear_fc1.layer_norm_weight",
        "layers.2.self_attention.linear_qkv.layer_norm_weight",
        "layers.3.mlp.linear_fc1.layer_norm_weight",
        "final_norm.weight",
    }


def test_attention_turns_by_the_shared_spectrum(one_process: None) -> None:
    """Q and K as core attention gets them, against complex numbers: θ_i = base^(-2i/d), positions over the factor."""
    base, factor, length = 500.0, 4.0, 12
    model = build_hybrid("*-", rotary=UnifiedRotaryEmbedding(base=base, interpolation_factor=factor), rotary_base=77)
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
    [("*-", "rope", False), *((p, e, g) for e in POSITION_ENCODINGS for p, g in (("M-", True), ("M-M*-", False)))],
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
    model = build_hybrid("M-*-", state_space=state_space_config(position_encoding=encoding))
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
    model = build_hybrid("M-*-M-*-", state_space=state_space_config(position_encoding=encoding)).eval()
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


def parts(layer: Any) -> tuple[Any, Any]:
    """A layer's norm, and its mixer or FFN."""
    if isinstance(layer, MambaLayer):
        return layer.norm, layer.mixer
    if isinstance(layer.self_attention, IdentityOp):
        return layer.pre_mlp_layernorm, layer.mlp
    return layer.input_layernorm, partial(layer.self_attention, attention_mask=None)


@pytest.mark.parametrize("ablation", [None, "no_residual", "no_norm"])
def test_layers_leave_out_residuals_or_norms(
    one_process: None, monkeypatch: pytest.MonkeyPatch, ablation: str | None
) -> None:
    changes: Changes = {"megatron.mock_data": True, "model.ablation": ablation}
    model = build_model(changed(TINY, changes), monkeypatch)
    perturb(model)
    x_LBD = torch.randn(8, 2, TINY.model.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer in model.decoder.layers:
        norm, inner = parts(layer)
        assert isinstance(norm, IdentityOp) is (ablation == "no_norm")
        wanted, _ = inner(norm(x_LBD))
        found = layer(x_LBD, attention_mask=None)
        # Attention layers also return a context.
        found = found[0] if isinstance(found, tuple) else found
        assert relative_error(found, wanted if ablation == "no_residual" else x_LBD + wanted) < 1e-6
    assert not isinstance(model.decoder.final_norm, IdentityOp)
