"""The Adam that Megatron's distributed optimizer can resume, against torch's own."""

import copy

import pytest
import torch

from megatron_txssm.platform.adam import Adam

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((7,), (3, 5))


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype) * 10.0 ** (step % 5 - 2)
        optimizer.step()


@pytest.mark.parametrize(("adam_w_mode", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_equals_torch(adam_w_mode: bool, reference: type[torch.optim.Optimizer]) -> None:
    ours, theirs = parameters(), parameters()
    train(Adam(ours, adam_w_mode=adam_w_mode, **SETTINGS), ours, range(20))
    train(reference(theirs, **SETTINGS), theirs, range(20))  # pyright: ignore[reportCallIssue]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # The two modes must differ, or one comparison would be vacuous.
    other = parameters()
    train(Adam(other, adam_w_mode=not adam_w_mode, **SETTINGS), other, range(20))
    assert not torch.allclose(ours[0], other[0], rtol=1e-4)


def test_state_has_the_layout_that_megatron_saves() -> None:
    params = parameters()
    optimizer = Adam(params, **SETTINGS)
    assert len(optimizer.state) == 0
    train(optimizer, params, range(3))
    assert optimizer.param_groups[0]["step"] == 3
    for param in params:
        assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}
        assert all(value.shape == param.shape for value in optimizer.state[param].values())


def test_parameters_without_gradients_stay() -> None:
    params = parameters()
    before = params[1].detach().clone()
    optimizer = Adam(params, **SETTINGS)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert params[1].equal(before)
    assert params[1] not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumes_bit_exactly(dtype: torch.dtype) -> None:
    straight = parameters(dtype)
    train(Adam(straight, **SETTINGS), straight, range(12))

    first = parameters(dtype)
    optimizer = Adam(first, **SETTINGS)
    train(optimizer, first, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in first]
    optimizer = Adam(resumed, **SETTINGS)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["step"] == 5
    train(optimizer, resumed, range(5, 12))
    for a, b in zip(straight, resumed, strict=True):
        assert a.equal(b)
