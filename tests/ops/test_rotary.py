"""Shapes and dtypes of `apply_rotary`; its values are tested with the tables, in test_unified_rope.py."""

import math
from pathlib import Path

import pytest
import torch

from megatron_txssm.ops.rotary import apply_rotary


def test_turns_the_first_half_towards_the_second():
    """Rotations by 90, 180 and 360 degrees; plane i is (x[i], x[i + N/2])."""
    angles_LR = torch.tensor([[math.pi / 2, math.pi], [0.0, 2 * math.pi]], dtype=torch.float64)
    x_BLGN = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).expand(1, 2, 1, 4)
    expected = torch.tensor([[-3.0, -2.0, 1.0, -4.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).view(1, 2, 1, 4)
    torch.testing.assert_close(apply_rotary(x_BLGN, angles_LR.cos(), angles_LR.sin()), expected)


def test_batched_tables():
    """[B, L, R]: each sequence of a batch at its own positions."""
    x = torch.randn(2, 5, 3, 8)
    angles = torch.randn(2, 5, 4)
    together = apply_rotary(x, angles.cos(), angles.sin())
    for b in range(2):
        assert torch.equal(together[b : b + 1], apply_rotary(x[b : b + 1], angles[b].cos(), angles[b].sin()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_returns_the_type_of_x_and_rounds_once(dtype):
    x = torch.randn(1, 64, 2, 16).to(dtype)
    angles = 100 * torch.randn(64, 8)
    y = apply_rotary(x, angles.cos(), angles.sin())
    assert y.dtype == dtype
    exact = apply_rotary(x.double(), angles.cos(), angles.sin())
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


def test_errors_name_value_and_remedy():
    with pytest.raises(ValueError, match=r"width=7 is odd .* use an even d_state"):
        apply_rotary(torch.zeros(1, 2, 1, 7), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="width=8 does not fit a table of 3 planes; use a table for width 8"):
        apply_rotary(torch.zeros(1, 2, 1, 8), torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_compiles_for_an_h100(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles to machine code, with a launch's specialisations; triton_checks.py runs it."""
    triton = pytest.importorskip("triton", reason="comes with torch's wheels for Linux")
    from megatron_txssm.ops.rotary_triton import _rotate_token

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"x_n": 1, "cos_r": 1, "sin_r": 1, "BLOCK_G": 8, "BLOCK_R": 64}
    signature = {"x": f"*{dtype}", "turned": f"*{dtype}", "cos": "*fp32", "sin": "*fp32"}
    names = _rotate_token.arg_names
    signature = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in names}
    source = triton.compiler.ASTSource(_rotate_token, signature, constexprs=constants)
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
