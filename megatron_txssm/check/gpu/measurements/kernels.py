"""Compares the kernels of a state-space layer with the recurrence in fp64, at the sizes of the recipes."""

# B=batch L=sequence H=heads P=head dim G=groups N=state

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd import ssd
from megatron_txssm.ops.ssd_reference import ssd_reference

HEAD_DIM, STATE_SIZE = 64, 128
NAMES = ("y", "state", "dx", "ddt", "dA", "dB", "dC")
# Inputs of the scan that have the activations' dtype: x, B and C; dt and A are fp32.
ACTIVATIONS = (True, False, False, True, True)


def scan_inputs(
    length: int, heads: int, groups: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """x, dt, A, B, C from the device's random state; B and C are views of one tensor, as in the mixer."""
    x_BLHP = torch.randn(1, length, heads, HEAD_DIM, device=device, dtype=dtype)
    dt_BLH = F.softplus(torch.randn(1, length, heads, device=device) - 4)
    A_H = -torch.empty(heads, device=device).uniform_(1, 16)
    BC_BLGN = torch.randn(1, length, 2 * groups, STATE_SIZE, device=device, dtype=dtype)
    return (x_BLHP, dt_BLH, A_H, *BC_BLGN.chunk(2, dim=2))


def errors(device: str, *, small: bool) -> dict[str, float]:
    """Largest relative error, ‖found - exact‖ / ‖exact‖, of output, final state and gradients, by operator and dtype.

    With TRITON_F32_DEFAULT=ieee, which Triton reads on import, only fp32 is checked: bf16 does not depend on it.
    """
    torch.manual_seed(0)
    length, heads, groups = (96, 4, 2) if small else (1024, 24, 4)
    inputs = scan_inputs(length, heads, groups, device)
    ieee = os.environ.get("TRITON_F32_DEFAULT") == "ieee"
    types = {"fp32, IEEE": torch.float32} if ieee else {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = {f"scan, {name}": _scan_error(inputs, dtype) for name, dtype in types.items()}
    return found | {f"rotation, {name}": _rotation_error(inputs[3], dtype) for name, dtype in types.items()}


def _scan_error(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    given = [t.to(dtype) if active else t for t, active in zip(inputs, ACTIVATIONS, strict=True)]
    exact = _outputs_and_gradients(ssd_reference, [t.double() for t in given])
    found = _outputs_and_gradients(lambda *t: ssd(*t, chunk_size=256, backend="auto"), given)
    return max(_relative(ours, theirs) for ours, theirs in zip(found, exact, strict=True))


def _outputs_and_gradients(scan: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """y, the final state and all five gradients; the cotangents depend only on the shapes."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = scan(*leaves)
    generator = torch.Generator(leaves[0].device).manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def _rotation_error(x_BLGN: Tensor, dtype: torch.dtype) -> float:
    given = x_BLGN.to(dtype)
    angles_LR = torch.randn(x_BLGN.shape[1], STATE_SIZE // 2, device=x_BLGN.device)
    found = apply_rotary(given, angles_LR.cos(), angles_LR.sin())
    exact = apply_rotary(given.double(), angles_LR.double().cos(), angles_LR.double().sin())
    return _relative(found, exact)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
