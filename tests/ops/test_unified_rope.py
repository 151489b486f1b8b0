"""Unified RoPE against complex numbers in fp64 and Megatron's own table; then properties that the model relies on."""

# B=batch L=sequence G=groups N=state R=N/2 planes of rotation

import math
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from torch.nn import functional as F

from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd_torch import ssd_torch
from megatron_txssm.ops.unified_rope import UnifiedRotaryEmbedding, length_scale

HEAD_DIM, STATE = 64, 128


def exact_angles(positions_L: Tensor, width: int) -> Tensor:
    frequencies = torch.tensor([10000.0 ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    return positions_L.double()[:, None] * frequencies


def complex_oracle(x_BLGN: Tensor, angles_LR: Tensor) -> Tensor:
    """Plane i as the complex number x[i] + j·x[i + N/2], times exp(j·angle), in fp64."""
    first, second = x_BLGN.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.exp(1j * angles_LR.double())[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("width", [HEAD_DIM, STATE])
def test_rotation_and_its_backward_equal_complex_numbers_up_to_16k(width):
    length = 16384
    rope = UnifiedRotaryEmbedding()
    cos_LR, sin_LR = rope.cos_sin(length, width)
    x = torch.randn(1, length, 1, width, requires_grad=True)
    upstream = torch.randn(1, length, 1, width)
    y = apply_rotary(x, cos_LR, sin_LR)
    (gradient,) = torch.autograd.grad(y, x, upstream)

    angles_LR = rope.angle_table(length, width)
    scale = x.detach().abs().max()
    assert (y - complex_oracle(x.detach(), angles_LR)).abs().max() <= 1e-6 * scale
    # The gradient of a rotation is the inverse rotation of the incoming gradient.
    assert (gradient - complex_oracle(upstream, -angles_LR)).abs().max() <= 1e-6 * upstream.abs().max()


@pytest.mark.parametrize("factor", [1.0, 3.0, 4.0])
@pytest.mark.parametrize("offset", [0, 777])
def test_table_is_bit_by_bit_megatrons(factor, offset, monkeypatch):
    # Megatron moves its frequencies to "the current device" even without one.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    scaling: dict[str, Any] = {} if factor == 1 else {"seq_len_interpolation_factor": factor}
    megatron = RotaryEmbedding(HEAD_DIM, rotary_percent=1.0, use_cpu_initialization=True, **scaling)
    ours = UnifiedRotaryEmbedding(interpolation_factor=factor).megatron_table(16384, HEAD_DIM, offset=offset)
    assert torch.equal(ours, megatron(16384, offset=offset))


def test_attention_and_state_space_rotate_alike():
    """Megatron's application of its table equals our rotation: same pairing, same direction."""
    rope = UnifiedRotaryEmbedding()
    x_BLGN = torch.randn(2, 300, 4, HEAD_DIM)
    theirs = rotate_as_attention(x_BLGN, rope.megatron_table(300, HEAD_DIM))
    torch.testing.assert_close(apply_rotary(x_BLGN, *rope.cos_sin(300, HEAD_DIM)), theirs, rtol=0, atol=1e-6)


def rotate_as_attention(x_BLGN: Tensor, table_L11N: Tensor) -> Tensor:
    x_LBGN = x_BLGN.transpose(0, 1)
    return _apply_rotary_pos_emb_bshd(x_LBGN, table_L11N, rotary_interleaved=False).transpose(0, 1)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_narrow_spectrum_is_every_second_frequency_of_the_wide_one(precision):
    rope = UnifiedRotaryEmbedding(table_precision=precision)
    wide, narrow = rope.angle_table(5000, STATE), rope.angle_table(5000, HEAD_DIM)
    assert wide.dtype == narrow.dtype == torch.float32
    assert torch.equal(wide[:, ::2], narrow)
    assert narrow[1, 0] == 1.0
    assert narrow[1, 16].item() == pytest.approx(1e-2, rel=1e-6)


@pytest.mark.parametrize("position", [4096, 16384, 131072, 1048576])
def test_angle_error_at_long_positions(position):
    """fp32: frequency and product are rounded, so the error grows with the position; fp64: half an fp32 ulp at most."""
    positions_L = torch.arange(position - 64, position + 1)
    exact_LR = exact_angles(positions_L, STATE)
    errors = {}
    for precision in ("fp32", "fp64"):
        rope = UnifiedRotaryEmbedding(table_precision=precision)
        angles_LR = rope.angle_table(65, STATE, offset=position - 64)
        distance = angles_LR.double() - exact_LR
        errors[precision] = (distance - 2 * math.pi * (distance / (2 * math.pi)).round()).abs().max().item()
        cos_error = (rope.cos_sin(65, STATE, offset=position - 64)[0].double() - exact_LR.cos()).abs().max().item()
        assert cos_error <= errors[precision] + 2**-24
    # Power, reciprocal and product: each within an ulp (2^-23), together within four halves.
    assert errors["fp32"] <= position * 2**-22
    # Half an ulp of numbers in [2, π].
    assert errors["fp64"] <= 2**-23 + 1e-9
    assert errors["fp64"] < errors["fp32"] / 100


def rotate_at(rope: UnifiedRotaryEmbedding, x_BLGN: Tensor, offset: int, as_attention: bool) -> Tensor:
    length, width = x_BLGN.shape[1], x_BLGN.shape[3]
    if as_attention:
        return rotate_as_attention(x_BLGN, rope.megatron_table(length, width, offset=offset))
    return apply_rotary(x_BLGN, *rope.cos_sin(length, width, offset=offset))


@pytest.mark.parametrize("shift", [1, 1000, 123457, 1000000])
@pytest.mark.parametrize(("width", "as_attention"), [(HEAD_DIM, True), (STATE, False)], ids=["q·k", "c·b"])
def test_scores_depend_on_distance_only(width, as_attention, shift):
    """<R_m c, R_n b> is unchanged when both positions move, and changed when one does (eq. 4)."""
    rope = UnifiedRotaryEmbedding(table_precision="fp64")
    query, key = F.normalize(torch.randn(2, 1, 32, 1, width), dim=-1)

    def scores(query_offset: int, key_offset: int) -> Tensor:
        rotated_query = rotate_at(rope, query, query_offset, as_attention)
        rotated_key = rotate_at(rope, key, key_offset, as_attention)
        return torch.einsum("blgn,bsgn->ls", rotated_query, rotated_key)

    assert (scores(shift, shift) - scores(0, 0)).abs().max() <= 2e-6
    assert (scores(shift, 0) - scores(0, 0)).abs().max() > 1e-2


def test_ssd_is_shift_invariant():
    """Packed documents need not restart their positions: the rotated scan gives the same y at any offset."""
    rope = UnifiedRotaryEmbedding(table_precision="fp64")
    x, dt, A = torch.randn(1, 100, 2, 4), F.softplus(torch.randn(1, 100, 2) - 4), torch.tensor([-1.0, -16.0])
    B, C = torch.randn(2, 1, 100, 1, STATE)

    def y_at(offset: int) -> Tensor:
        rotated = (apply_rotary(t, *rope.cos_sin(100, STATE, offset=offset)) for t in (B, C))
        return ssd_torch(x, dt, A, *rotated, chunk_size=32)[0]

    y = y_at(0)
    assert (y_at(54321) - y).abs().max() <= 1e-5 * y.abs().max()
    unrotated = ssd_torch(x, dt, A, B, C, chunk_size=32)[0]
    assert (unrotated - y).abs().max() > 1e-2 * y.abs().max()


def test_explicit_positions_index_the_table():
    """The positions of a context-parallel rank: two zigzag parts, the first and the last eighth."""
    rope = UnifiedRotaryEmbedding()
    positions_L = torch.cat((torch.arange(0, 100), torch.arange(700, 800)))
    cos_LR, sin_LR = rope.cos_sin(200, STATE, positions_L=positions_L)
    whole_cos, whole_sin = rope.cos_sin(800, STATE)
    assert torch.equal(cos_LR, whole_cos[positions_L]) and torch.equal(sin_LR, whole_sin[positions_L])
    table = rope.megatron_table(200, HEAD_DIM, positions_L=positions_L)
    assert torch.equal(table, rope.megatron_table(800, HEAD_DIM)[positions_L])
    with pytest.raises(ValueError, match=r"positions_L.shape=\[200\] with length=100 and offset=0 .* give `length`"):
        rope.angle_table(100, HEAD_DIM, positions_L=positions_L)


def test_layers_share_one_table_and_decoding_does_not_grow_the_cache(monkeypatch):
    rope = UnifiedRotaryEmbedding()
    computed = []
    angle_table = rope.angle_table
    monkeypatch.setattr(rope, "angle_table", lambda *a, **k: computed.append(a) or angle_table(*a, **k))
    tables = [rope.cos_sin(1000, STATE) for _ in range(24)]
    assert len(computed) == 1
    assert len({cos_LR.data_ptr() for cos_LR, _ in tables}) == 1
    for position in range(1000, 5000):
        cos_LR, _ = rope.cos_sin(1, STATE, offset=position)
        assert cos_LR.shape == (1, STATE // 2)
    # Blocks of 1024 from 0, 1024, 2048, 3072 and 4096 on; the earlier ones are not kept.
    assert len(computed) == 5
    assert [cos_LR.shape[0] for _, cos_LR, _ in rope._cos_sin.values()] == [1024]


def test_the_cache_answers_as_the_table_does_from_anywhere():
    """Back and forth, across block boundaries, longer and shorter than a block."""
    rope = UnifiedRotaryEmbedding()
    for offset, length in [(0, 1), (1000, 100), (2047, 2), (5, 3000), (70000, 1), (1023, 1), (1024, 1), (4095, 5000)]:
        angles_LR = rope.angle_table(length, STATE, offset=offset)
        cos_LR, sin_LR = rope.cos_sin(length, STATE, offset=offset)
        assert torch.equal(cos_LR, angles_LR.cos()) and torch.equal(sin_LR, angles_LR.sin())


def test_a_table_made_while_generating_serves_training():
    rope = UnifiedRotaryEmbedding()
    with torch.inference_mode():
        rope.cos_sin(10, 8)
    x = torch.randn(1, 10, 1, 8, requires_grad=True)
    apply_rotary(x, *rope.cos_sin(10, 8)).sum().backward()
    assert x.grad is not None


def test_length_scale():
    positions_L = torch.tensor([0, 1, 4094, 4095, 4096, 16383, 4096**2 - 1])
    scale_L = length_scale(positions_L, 4096)
    assert torch.equal(scale_L[:4], torch.ones(4))
    # log_4096(16384) = 14/12 and log_4096(4096²) = 2.
    assert scale_L[4:].tolist() == pytest.approx([math.log(4097) / math.log(4096), 14 / 12, 2.0], rel=1e-7)
    assert length_scale(torch.tensor([16383]), 4096) == scale_L[5]
    with pytest.raises(ValueError, match="length_scaling_base=1 is not above 1; use"):
        length_scale(positions_L, 1)


@pytest.mark.parametrize("method", ["angle_table", "cos_sin", "megatron_table"])
def test_odd_width_is_refused(method):
    with pytest.raises(ValueError, match=r"width=63 is odd .* use an even head_dim or d_state"):
        getattr(UnifiedRotaryEmbedding(), method)(10, 63)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"base": 1.0}, "base=1.0 is not above 1"),
        ({"interpolation_factor": 0.0}, "interpolation_factor=0.0 is not positive"),
        ({"table_precision": "bf16"}, "table_precision='bf16' is unknown; use fp32 or fp64"),
    ],
)
def test_constructor_errors_name_value_and_remedy(keywords, message):
    with pytest.raises(ValueError, match=message):
        UnifiedRotaryEmbedding(**keywords)


def test_one_table_serves_all_attention_layers():
    rope = UnifiedRotaryEmbedding()
    table = rope.megatron_table(8, HEAD_DIM)
    assert rope.megatron_table(8, HEAD_DIM) is table
    assert rope.megatron_table(9, HEAD_DIM)[:8].equal(table)
    assert rope.megatron_table(8, HEAD_DIM, offset=1)[:7].equal(table[1:])
