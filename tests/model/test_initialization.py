"""initialize_by_name: in every layout, weights are a function of the seed and the parameter's name."""

import functools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from megatron_txssm.architecture.layer_pattern import layers
from megatron_txssm.model import initialization
from megatron_txssm.model.initialization import ROWS_PER_DRAW, initialize_by_name
from tests.support.distributions import assert_uniform
from tests.support.ranks import model_parallel, run_ranks
from tests.support.tiny_model import (
    Piece,
    assembled,
    build_hybrid,
    perturb,
    pieces,
    state_space_config,
    transformer_config,
)

PATTERN = "M-M-*-M-"
STATE_SPACE = state_space_config(position_encoding="conv1d_d", gated=True)


def initialized(seed: int = 1, *, vp_stage: int | None = None, pattern: str = PATTERN, **kwargs: Any) -> nn.Module:
    config = transformer_config(
        num_layers=len(layers(pattern)),
        is_hybrid_model=True,
        virtual_pipeline_model_parallel_size=None if vp_stage is None else 2,
    )
    model = build_hybrid(pattern, config, STATE_SPACE, vp_stage=vp_stage, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.fill_(torch.nan)
    initialize_by_name(model, seed)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return assembled([pieces(model, dict(model.named_parameters()))])


def layouts() -> dict[str, list[Piece]]:
    """This rank's pieces of the model in each layout of two ranks."""
    found = {}
    with model_parallel(tensor=2, seed=5):
        model = initialized()
        found["TP2"] = pieces(model, dict(model.named_parameters()))
        model = initialized(share_embeddings_and_output_weights=False)
        found["TP2-untied"] = pieces(model, dict(model.named_parameters()))
    with model_parallel(pipeline=2, seed=6):
        model = initialized()
        found["PP2"] = pieces(model, dict(model.named_parameters()))
    with model_parallel(pipeline=2, virtual=2, seed=7):
        stages = [initialized(vp_stage=stage, pattern="M-|M-|*-|M-") for stage in (0, 1)]
        found["PP2xVPP2"] = [piece for stage in stages for piece in pieces(stage, dict(stage.named_parameters()))]
    return found


def test_every_layout_starts_from_the_same_weights(one_process: None, tmp_path: Path) -> None:
    tied = weights(initialized())
    untied = weights(initialized(share_embeddings_and_output_weights=False))
    ranks = run_ranks(layouts, 2, tmp_path)
    for layout, expected in {"TP2": tied, "TP2-untied": untied, "PP2": tied, "PP2xVPP2": tied}.items():
        actual = assembled([rank[layout] for rank in ranks])
        assert actual.keys() == expected.keys(), layout
        assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items()), layout
    # The tied embedding exists at both ends of a pipeline.
    ends = [[data for key, *_, data in rank["PP2"] if key == "embedding.word_embeddings.weight"] for rank in ranks]
    assert len(ends[0]) == len(ends[1]) == 1 and torch.equal(ends[0][0], ends[1][0])


EXPERTS = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 8,
    "moe_shared_expert_intermediate_size": 12,
    "moe_token_dispatcher_type": "alltoall",
}


def with_experts(pattern: str = "ME*E|M-", **settings: Any) -> nn.Module:
    config = transformer_config(num_layers=6, is_hybrid_model=True, **EXPERTS, **settings)
    model = build_hybrid(pattern, config, STATE_SPACE)
    perturb(model)
    initialize_by_name(model, 1)
    return model


def layouts_of_experts() -> dict[str, list[Piece]]:
    """This rank's pieces of the model in layouts of two ranks; the second stage of PP2 has no experts."""
    found = {}
    for layout, sizes, settings in (
        ("EP2", {"expert": 2}, {"pattern": "ME*EM-"}),
        ("TP2", {"tensor": 2}, {"pattern": "ME*EM-", "sequence_parallel": True}),
        ("PP2", {"pipeline": 2}, {}),
    ):
        with model_parallel(**sizes, seed=5):
            model = with_experts(**settings)
            found[layout] = pieces(model, dict(model.named_parameters()))
    return found


def test_every_layout_starts_from_the_same_experts(one_process: None, tmp_path: Path) -> None:
    expected = weights(with_experts("ME*EM-"))
    drawn = [key for key in expected if "norm" not in key and not key.endswith(".D")]
    ranks = run_ranks(layouts_of_experts, 2, tmp_path)
    for layout in ("EP2", "TP2", "PP2"):
        actual = assembled([rank[layout] for rank in ranks])
        assert actual.keys() == expected.keys(), layout
        assert all(torch.equal(actual[key], expected[key]) for key in drawn), layout
    # Each expert is drawn by itself, and each layer.
    for part in ("linear_fc1", "linear_fc2"):
        experts = [expected[f"decoder.layers.{layer}.mlp.experts.experts.{part}.weight"] for layer in (1, 3)]
        distinct = {tuple(weight.flatten().tolist()) for layer in experts for weight in layer}
        assert len(distinct) == 2 * EXPERTS["num_moe_experts"]
    # Rank 0 of EP2 has the first two experts of four, that of TP2 half of each.
    shapes = {
        layout: {data.shape for key, *_, data in ranks[0][layout] if key.endswith("experts.linear_fc2.weight")}
        for layout in ("EP2", "TP2")
    }
    assert shapes == {"EP2": {(1, 16, 8), (16, 12)}, "TP2": {(1, 16, 4), (16, 6)}}


def test_the_seed_and_the_name_make_the_weight(one_process: None) -> None:
    first, again, other = weights(initialized(1)), weights(initialized(1)), weights(initialized(2))
    drawn = [key for key in first if "norm" not in key and not key.endswith(".D")]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in drawn)
    drawn = [first[f"decoder.layers.{layer}.mixer.in_proj.weight.x"] for layer in (0, 2, 6)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_the_global_random_state_is_left_alone(one_process: None) -> None:
    model = build_hybrid(PATTERN, state_space=STATE_SPACE)
    before = torch.get_rng_state()
    initialize_by_name(model, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_values_are_megatrons_and_mamba_2s(one_process: None) -> None:
    config = transformer_config(
        num_layers=4, is_hybrid_model=True, hidden_size=128, ffn_hidden_size=256, init_method_std=0.05
    )
    sizes = state_space_config(
        hidden_size=128, num_heads=256, head_dim=1, state_size=64, position_encoding="conv1d_d", gated=True
    )
    model = build_hybrid("M-*-", config, sizes, vocab_size=512, share_embeddings_and_output_weights=False)
    norms = {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name}
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in norms:
                parameter.copy_(norms[name])
    initialize_by_name(model, 3)
    whole = weights(model)
    # Megatron's scaled init of projections into the residual stream: std / sqrt(layers), a mixer and an FFN being two.
    scaled = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")
    for key, tensor in whole.items():
        if tensor.dim() == 2:
            expected = 0.05 / (4**0.5) if key.endswith(scaled) else 0.05
            # Four standard errors of a standard deviation, σ/√(2n) each.
            assert abs(tensor.std().item() / expected - 1) < 4 / (2 * tensor.numel()) ** 0.5, key
            assert abs(tensor.mean().item()) < 4 * expected / tensor.numel() ** 0.5, key
        elif "norm" in key or key.endswith(".D"):
            assert tensor.eq(1).all(), key
    mixer = "decoder.layers.0.mixer"
    assert_uniform(whole[f"{mixer}.A_log"].exp(), 1, 16)
    dt = torch.nn.functional.softplus(whole[f"{mixer}.dt_bias"].double())
    assert_uniform(dt.log(), math.log(1e-3), math.log(1e-1))
    for parameter in ("weight.x", "weight.B", "weight.C", "bias.x", "bias.B", "bias.C"):
        assert_uniform(whole[f"{mixer}.conv1d_{parameter}"].flatten(), -0.5, 0.5)


@pytest.mark.parametrize("rows", [ROWS_PER_DRAW, 3 * ROWS_PER_DRAW])
def test_the_embedding_does_not_depend_on_its_padding(one_process: None, rows: int) -> None:
    def embedding(vocab_size: int) -> Tensor:
        return weights(initialized(pattern="M-*-", vocab_size=vocab_size))["embedding.word_embeddings.weight"]

    assert torch.equal(embedding(rows), embedding(rows + ROWS_PER_DRAW)[:rows])
    # Rows of different draws are different.
    longer = embedding(2 * ROWS_PER_DRAW)
    assert not torch.equal(longer[:ROWS_PER_DRAW], longer[ROWS_PER_DRAW:])


def test_no_parameter_is_forgotten(one_process: None) -> None:
    """`initialized` fills all but norms with NaN first."""
    whole = weights(initialized(share_embeddings_and_output_weights=False))
    assert not any(tensor.isnan().any() for tensor in whole.values())


def shard(rows: slice, columns: slice, height: int = 300, width: int = 48) -> ShardedTensor:
    lengths = rows.stop - rows.start, columns.stop - columns.start
    offsets = rows.start, columns.start
    return ShardedTensor("weight", None, torch.float32, lengths, (height, width), offsets, None)


@pytest.mark.parametrize("cores", [1, 3, 64])
@pytest.mark.parametrize(
    "rows, columns",
    [
        (slice(0, 300), slice(0, 48)),
        (slice(150, 300), slice(0, 48)),
        (slice(7, 8), slice(0, 48)),
        (slice(0, 300), slice(12, 24)),
        (slice(129, 290), slice(47, 48)),
    ],
)
def test_a_part_of_a_large_weight_has_the_numbers_of_the_whole(
    rows: slice, columns: slice, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal, drawn = torch.nn.init.normal_, []

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        drawn.append(tensor.numel())
        return normal(tensor, *arguments, **options)

    monkeypatch.setattr(torch.nn.init, "normal_", counted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    rule = functools.partial(torch.nn.init.normal_, mean=0.0, std=0.02)
    whole = initialization._draw(rule, shard(slice(0, 300), slice(0, 48)), "1")
    monkeypatch.setattr(initialization, "NUMBERS_PER_THREAD", 1000)
    drawn.clear()
    part = initialization._draw(rule, shard(rows, columns), "1")
    assert torch.equal(part, whole[rows, columns])
    assert sum(drawn) == len(part) * 48
    assert len(drawn) <= 3 or cores > 1


def test_what_cannot_be_drawn_in_parts_is_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule other than normal, and a width that is not a multiple of 16."""
    normal = functools.partial(torch.nn.init.normal_, mean=0.0, std=0.02)
    some = slice(100, 200)
    for rule, width in ((lambda tensor: tensor.uniform_(-1, 1), 48), (normal, 50)):
        whole = initialization._draw(rule, shard(slice(0, 300), slice(0, width), width=width), "1")
        with monkeypatch.context() as patch:
            patch.setattr(initialization, "NUMBERS_PER_THREAD", 1000)
            part = initialization._draw(rule, shard(some, slice(0, width), width=width), "1")
        assert torch.equal(part, whole[some])


def test_a_model_drawn_in_parts_is_the_same(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights(initialized(share_embeddings_and_output_weights=False))
    drawn_in_parts, draw_part = [], initialization._draw_part

    def counted(*arguments: Any) -> Tensor:
        drawn_in_parts.append(arguments)
        return draw_part(*arguments)

    monkeypatch.setattr(initialization, "NUMBERS_PER_THREAD", 64)
    monkeypatch.setattr(initialization, "_draw_part", counted)
    parts = weights(initialized(share_embeddings_and_output_weights=False))
    # All but a mixer's small parameters: two to five projections per layer, embedding and output layer.
    assert len(drawn_in_parts) > 3 * len(PATTERN)
    assert all(torch.equal(parts[key], tensor) for key, tensor in whole.items())
