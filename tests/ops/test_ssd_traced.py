"""`ssd_traced`: its values, that every kind of tracing uses it, and that no state leaks out of a trace."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_txssm.ops import ssd_blocks
from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd_reference import ssd_reference, ssd_step
from megatron_txssm.ops.ssd_torch import ssd_torch
from megatron_txssm.ops.ssd_traced import ssd_traced
from megatron_txssm.ops.state_passing import read_entering_state, surviving_share
from tests.ops.test_ssd import DOCUMENTS, HEADS, NAMES, TOLERANCE, assert_close, make_inputs, reference_run, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("length", "groups", "chunk_size"), [(1, 2, 64), (130, 1, 16), (130, HEADS, 100), (1000, 2, 64)]
)
def test_equals_the_reference(length: int, groups: int, chunk_size: int, dtype: torch.dtype) -> None:
    actual = run(ssd_traced, make_inputs(length, groups, dtype), chunk_size=chunk_size)
    assert_close(actual, reference_run(length, groups), TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
def test_packed_documents_equal_the_reference(lengths: list[int]) -> None:
    """Numbers recur: only changes matter. The other row is one document."""
    packed = torch.tensor([number % 2 for number, length in enumerate(lengths) for _ in range(length)])
    options = {"seq_idx": torch.stack([packed, torch.zeros_like(packed)])}
    inputs = make_inputs(sum(lengths), groups=2)
    actual = run(ssd_traced, inputs, chunk_size=16, **options)
    assert_close(actual, run(ssd_reference, inputs, **options), TOLERANCE[torch.float64])


def test_strong_decay_has_the_right_gradients() -> None:
    """Above the diagonal exp(+64·12) overflows: masking after exp would give 0·inf = NaN."""
    inputs = make_inputs(130, groups=2)
    inputs["A"], inputs["dt"] = torch.full_like(inputs["A"], -16.0), torch.full_like(inputs["dt"], 0.75)
    assert_close(run(ssd_traced, inputs, chunk_size=64), run(ssd_reference, inputs), 1e-8)


def test_the_gradients_have_gradients() -> None:
    inputs = make_inputs(5, groups=2, batch=1, head_dim=1, state=2)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1]])

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_torch(*tensors[:5], chunk_size=3, initial_state=tensors[5], seq_idx=seq_idx)

    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradgradcheck(function, leaves)


def test_autocast_rounds_nothing() -> None:
    """Scans of either kind, a step, and a piece's read of its entering state."""
    x, dt, A, B, C, state = make_inputs(40, groups=2, dtype=torch.float32).values()
    functions: list[Callable[[], Tensor]] = [
        lambda: ssd_traced(x, dt, A, B, C, chunk_size=16, initial_state=state)[0],
        lambda: ssd_torch(x, dt, A, B, C, chunk_size=16, initial_state=state)[0],
        lambda: ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)[0],
        lambda: read_entering_state(surviving_share(dt, A, None), C, state),
    ]
    for function in functions:
        exact = function()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(function(), exact)


def test_nothing_is_kept_of_stand_ins() -> None:
    """Fake tensors, as compilers use: the thread's next call would compute in buffers without memory."""
    inputs = [make_inputs(40, groups=2, dtype=torch.float32)[name] for name in NAMES[:5]]
    angles = torch.randn(40, 4)
    found = []

    def work() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(tensor) for tensor in inputs]
            y, _ = ssd_torch(*fake, chunk_size=16)
            apply_rotary(fake[3], angles.cos(), angles.sin())
            found.append((y.shape, dict(ssd_blocks._kept_scratch.__dict__)))
        found.append(ssd_torch(*inputs, chunk_size=16)[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] == (inputs[0].shape, {})
    assert torch.equal(found[1], ssd_torch(*inputs, chunk_size=16)[0])
