"""Which calls Mamba-2's convolution passes to causal-conv1d; its gated norm is tested in triton_checks.py."""

# B=batch L=sequence E=channels K=convolution taps

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_txssm.ops.mamba2 import causal_convolution
from tests.ops.causal_conv1d_stand_in import install
from tests.ops.test_ssd import assert_close

BATCH, LENGTH, CHANNELS = 2, 21, 24
KINDS = ("plain", "history", "documents")


def make_inputs(taps: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(taps)
    shapes = {
        "packed": (LENGTH, BATCH, 8 + CHANNELS + 32),
        "weight": (CHANNELS, 1, taps),
        "bias": (CHANNELS,),
        "history": (BATCH, CHANNELS, taps - 1),
    }
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


def results(inputs: dict[str, Tensor], kind: str, backend: str, before: int = 8) -> dict[str, Tensor]:
    """Output and all gradients, for channels in the middle of a packed projection, tokens before batch."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    x_BLE = leaves["packed"].transpose(0, 1)[..., before : before + CHANNELS]
    options: dict[str, Any] = {"history_BEK": leaves["history"]} if kind == "history" else {}
    if kind == "documents":
        lengths = torch.tensor([[5, 1, 2, 13], [9, 3, 8, 1]])
        options["document_BL"] = torch.stack([torch.repeat_interleave(torch.arange(1, 5), row) for row in lengths]).to(
            x_BLE.device
        )
    out = causal_convolution(x_BLE, leaves["weight"], leaves["bias"], backend=backend, **options)
    assert out.shape == x_BLE.shape and out.dtype == x_BLE.dtype
    generator = torch.Generator().manual_seed(0)
    out.backward(torch.randn(out.shape, generator=generator).to(out.device, out.dtype))
    found = {f"d{name}": leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.cpu(), **found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_the_kernel_is_given_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, taps: int, kind: str, dtype: torch.dtype
) -> None:
    inputs = make_inputs(taps, dtype)
    expected = results({name: tensor.double() for name, tensor in inputs.items()}, kind, "torch")
    calls = install(monkeypatch)
    actual = results(inputs, kind, "triton")
    assert [[part is not None for part in call] for call in calls] == [[kind == "documents", kind == "history"]]
    assert actual.keys() == expected.keys() and ("dhistory" in actual) == (kind == "history")
    assert_close(actual, expected, 1e-5 if dtype == torch.float32 else 2**-6)


def test_what_the_kernel_cannot_take_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch)
    inputs = make_inputs(4)

    def taken(x_BLE: Tensor, taps: int = 4, backend: str = "triton", **options: Any) -> bool:
        count, channels = len(calls), x_BLE.shape[2]
        weight_E1K = torch.zeros(channels, 1, taps, dtype=x_BLE.dtype, device=x_BLE.device)
        causal_convolution(x_BLE, weight_E1K, weight_E1K[:, 0, 0].contiguous(), backend=backend, **options)
        return len(calls) > count

    x_BLE = inputs["packed"].transpose(0, 1)
    assert taken(x_BLE) and taken(x_BLE[..., 8:32]) and taken(x_BLE[:, :1]) and taken(x_BLE[:1])
    # Misaligned address, channel count, strides; non-contiguous channels; taps; dtypes.
    assert not taken(x_BLE[..., 1:9]) and not taken(x_BLE[..., :9]) and not taken(torch.zeros(2, 5, 12)[..., :8])
    assert not taken(torch.zeros(2, 16, 8).mT)
    assert not taken(x_BLE, taps=5) and not taken(x_BLE.double()) and not taken(x_BLE, backend="torch")
    # Documents in a history, as on context-parallel ranks.
    document_BL, before_BK = torch.ones(BATCH, LENGTH, dtype=torch.long), torch.ones(BATCH, 3, dtype=torch.long)
    assert not taken(x_BLE, document_BL=document_BL, document_before_BK=before_BK)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: `python -m pytest -m gpu tests/ops`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_the_kernel_equals_pytorch_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, taps: int, kind: str, dtype: torch.dtype
) -> None:
    if importlib.util.find_spec("causal_conv1d") is None or importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("needs causal-conv1d and mamba-ssm; docs/gpu.md says how to install them")
    from megatron_txssm.ops import mamba2

    kernel, calls = mamba2._causal_conv1d(), []
    monkeypatch.setattr(mamba2, "_causal_conv1d", lambda: lambda *a, **k: (calls.append(k), kernel(*a, **k))[1])
    inputs = make_inputs(taps, dtype)
    actual = results({name: tensor.cuda() for name, tensor in inputs.items()}, kind, "auto")
    assert len(calls) == 1
    expected = results({name: tensor.double() for name, tensor in inputs.items()}, kind, "torch")
    assert_close(actual, expected, 1e-5 if dtype == torch.float32 else 2**-6)
