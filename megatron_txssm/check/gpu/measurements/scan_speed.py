"""Milliseconds of the scan, forward and backward, compared with attention, PyTorch's scan and a lower bound."""

# B=batch L=sequence H=heads P=head dim G=groups N=state

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_txssm.check.gpu.measurements.kernels import HEAD_DIM, STATE_SIZE, scan_inputs
from megatron_txssm.ops.ssd import ssd
from megatron_txssm.ops.ssd_triton import import_error

HEADS, GROUPS = 12, 4
LENGTHS = (4096, 16384, 65536)
# PyTorch's scan is slow on long sequences, and its result is predictable.
LONGEST_BY_TORCH = 16384
CHUNK = 256


def milliseconds(device: str, *, small: bool) -> dict[str, Any]:
    """By length: {"kernels", "torch", "attention", "bound": ms}; no "kernels" without a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    bandwidth = _bytes_per_second(device)
    found: dict[str, Any] = {"bytes_per_second": bandwidth}
    for length in (256,) if small else LENGTHS:
        row: dict[str, float] = {"attention": _attention(length, device, dtype)}
        if device != "cpu" and import_error() is None:
            row["kernels"] = _scan(length, device, dtype, "triton")
        if length <= LONGEST_BY_TORCH or not row.get("kernels"):
            row["torch"] = _scan(length, device, dtype, "torch")
        row["bound"] = length * _least_bytes_per_token(dtype.itemsize) / bandwidth * 1e3
        found[str(length)] = row
    return found


def _least_bytes_per_token(itemsize: int) -> int:
    """Forward reads x, B, C, dt and writes y; backward reads these and dy, and writes a gradient for each input."""
    x, BC, dt = HEADS * HEAD_DIM * itemsize, 2 * GROUPS * STATE_SIZE * itemsize, HEADS * 4
    return (2 * x + BC + dt) + (3 * x + 2 * BC + 2 * dt)


def _bytes_per_second(device: str) -> float:
    """Bandwidth of a large copy, counting bytes read and bytes written."""
    source = torch.empty(2**26 if device == "cpu" else 2**30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (_median_ms(lambda: target.copy_(source), device) / 1e3)


def _scan(length: int, device: str, dtype: torch.dtype, backend: str) -> float:
    leaves = [t.detach().requires_grad_() for t in scan_inputs(length, HEADS, GROUPS, device, dtype)]
    return _both_ms(lambda: ssd(*leaves, chunk_size=CHUNK, backend=backend)[0], leaves, device)


def _attention(length: int, device: str, dtype: torch.dtype) -> float:
    shape = (1, HEADS, length, HEAD_DIM)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    attend = functools.partial(F.scaled_dot_product_attention, query, key, value, is_causal=True)
    return _both_ms(attend, [query, key, value], device)


def _both_ms(function: Callable[[], Tensor], leaves: list[Tensor], device: str) -> float:
    cotangent = torch.randn_like(function())
    return _median_ms(lambda: torch.autograd.grad(function(), leaves, cotangent), device)


def _median_ms(function: Callable[[], object], device: str, *, warm: int = 3, rounds: int = 9) -> float:
    """Time of one call, by the device's own clock; calls that take a second are repeated less often."""
    begin = time.perf_counter()
    function()
    if time.perf_counter() - begin > 1:
        warm, rounds = 0, 2
    for _ in range(warm):
        function()
    return statistics.median(_once_ms(function, device) for _ in range(rounds))


def _once_ms(function: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        function()
        return (time.perf_counter() - begin) * 1e3
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    function()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event)
