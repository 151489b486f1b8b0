"""causal-conv1d's function in PyTorch, for machines without a GPU: it rejects what the CUDA code would (1.7.0).

The checks are those of csrc/causal_conv1d.cpp. The kernels also assume addresses aligned to 16 bytes, unchecked there.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_txssm.ops import mamba2


def install(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor | None, Tensor | None]]:
    """Replace the kernels, as if selected; returns the list of every call's (seq_idx, initial_states)."""
    calls: list[tuple[Tensor | None, Tensor | None]] = []

    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        calls.append((seq_idx, initial_states))
        batch, channels, length = x.shape
        taps = weight.shape[1]
        assert x.dtype in (torch.float32, torch.bfloat16) and activation == "silu"
        _check_layout(x)
        assert weight.shape == (channels, taps) and 2 <= taps <= 4 and channels % 8 == 0
        assert bias.shape == (channels,) and bias.stride(0) == 1 and bias.dtype == weight.dtype
        before = x.new_zeros(batch, channels, taps - 1)
        if initial_states is not None:
            assert initial_states.shape == before.shape and initial_states.dtype == x.dtype
            assert initial_states.stride(1) == 1 and initial_states.data_ptr() % 16 == 0
            before = initial_states
        if seq_idx is not None:
            assert seq_idx.shape == (batch, length) and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
            seq_idx = F.pad(seq_idx, (taps - 1, 0), value=-1)
        seen = torch.cat([before, x], dim=2).float()
        out = bias.float()[:, None]
        for tap in range(taps):
            part = weight[:, tap, None].float() * seen[..., tap : tap + length]
            if seq_idx is not None:
                part = part * (seq_idx[:, None, tap : tap + length] == seq_idx[:, None, taps - 1 :])
            out = out + part
        out = torch.empty_like(x).copy_(F.silu(out))
        if out.requires_grad:
            out.register_hook(lambda dout: _check_layout(dout) if dout.stride(1) == 1 else None)
        return out

    monkeypatch.setattr(mamba2, "_causal_conv1d", lambda: causal_conv1d_fn)
    monkeypatch.setattr(mamba2, "is_fused", lambda backend, x, *_: backend != "torch" and x.dtype != torch.float64)
    return calls


def _check_layout(x: Tensor) -> None:
    """Channels last: the only layout that supports documents and histories."""
    assert x.stride(1) == 1 and x.stride(2) > 1 and x.stride(0) % 8 == x.stride(2) % 8 == x.data_ptr() % 16 == 0
