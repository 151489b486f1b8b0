"""Every SSD backend against the recurrence: outputs, states, every gradient; then properties that models rely on.

"Relative" error is max|a - b| / max|b| over a tensor; b is the fp64 recurrence on the same (fp32-representable) inputs.
"""

# B=batch L=sequence H=heads P=head dim G=groups N=state

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from megatron_txssm.architecture.state_space_config import StateSpaceConfig
from megatron_txssm.ops import ssd as ssd_module
from megatron_txssm.ops.ssd import is_fused, ssd
from megatron_txssm.ops.ssd_reference import ssd_reference, ssd_step
from megatron_txssm.ops.ssd_torch import ssd_torch

BATCH, HEADS, HEAD_DIM, STATE = 2, 4, 4, 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
NAMES = ("x", "dt", "A", "B", "C", "initial_state")


def make_inputs(
    length: int,
    groups: int,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = BATCH,
    head_dim: int = HEAD_DIM,
    state: int = STATE,
) -> dict[str, Tensor]:
    """Inputs as from a freshly initialised mixer: dt = softplus(...) around 1e-3 … 1e-1, A in -1 … -16."""
    generator = torch.Generator().manual_seed(1000 * length + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def spread(low: float, high: float) -> Tensor:
        return torch.empty(HEADS).uniform_(low, high, generator=generator)

    inputs = {
        "x": normal(batch, length, HEADS, head_dim),
        "dt": F.softplus(0.5 * normal(batch, length, HEADS) + spread(1e-3, 1e-1).expm1().log()),
        "A": -spread(1, 16),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "initial_state": normal(batch, HEADS, head_dim, state),
    }
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def run(function, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Outputs, and all gradients for one fixed random cotangent, by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    positional = [leaves[name] for name in NAMES[:5]]
    y, final_state = function(*positional, initial_state=leaves["initial_state"], **options)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y, final_state)]
    gradients = torch.autograd.grad([y, final_state], list(leaves.values()), cotangents)
    return {"y": y, "final_state": final_state} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def tokens_of(inputs: dict[str, Tensor], tokens: slice) -> list[Tensor]:
    """x, dt, A, B, C of a slice of tokens."""
    return [inputs[name] if name == "A" else inputs[name][:, tokens] for name in NAMES[:5]]


@cache
def reference_run(length: int, groups: int) -> dict[str, Tensor]:
    return run(ssd_reference, make_inputs(length, groups))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, b in expected.items():
        a = actual[name].double()
        assert torch.isfinite(a).all(), f"{name} is not finite"
        error = ((a - b.double()).abs().max() / b.double().abs().max()).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


def test_reference_is_the_matrix_form():
    """y = (L ∘ C Bᵀ)(dt x) with L[t, s] = prod_{s < r <= t} exp(dt_r A), computed entry by entry."""
    length, groups = 7, 2
    inputs = make_inputs(length, groups)
    y, final_state = ssd_reference(*(inputs[name] for name in NAMES[:5]))
    x, dt, A, B, C = (inputs[name] for name in NAMES[:5])
    for b in range(BATCH):
        for h in range(HEADS):
            g = h // (HEADS // groups)
            a = torch.exp(dt[b, :, h] * A[h])
            M = torch.zeros(length, length, dtype=torch.float64)
            for t in range(length):
                for s in range(t + 1):
                    M[t, s] = a[s + 1 : t + 1].prod() * (C[b, t, g] @ B[b, s, g]) * dt[b, s, h]
            torch.testing.assert_close(y[b, :, h], M @ x[b, :, h], rtol=1e-12, atol=1e-12)
            last = [a[s + 1 :].prod() * dt[b, s, h] * torch.outer(x[b, s, h], B[b, s, g]) for s in range(length)]
            torch.testing.assert_close(final_state[b, h], sum(last), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("length", [1, 63, 64, 1000, 4097])
def test_torch_equals_reference(length, dtype):
    actual = run(ssd_torch, make_inputs(length, groups=2, dtype=dtype), chunk_size=64)
    assert all(tensor.dtype == dtype for tensor in actual.values())
    assert_close(actual, reference_run(length, 2), TOLERANCE[dtype])


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("chunk_size", [1, 16, 100, 256])
def test_any_grouping_and_chunk_size(groups, chunk_size):
    actual = run(ssd_torch, make_inputs(130, groups), chunk_size=chunk_size)
    assert_close(actual, reference_run(130, groups), TOLERANCE[torch.float64])


def test_strong_decay_keeps_fp32_precision_in_long_chunks():
    """A chunk's prefix sums reach -400 here; in fp32 their differences alone would have errors of 1e-5 or more."""
    inputs = make_inputs(512, groups=1)
    inputs["A"] = torch.full_like(inputs["A"], -16.0)
    inputs["dt"] = inputs["dt"].clamp(min=0.1)
    expected = run(ssd_reference, inputs)
    actual = run(ssd_torch, {name: t.float() for name, t in inputs.items()}, chunk_size=256)
    assert_close(actual, expected, 1e-6)


def test_extreme_decay_has_finite_gradients():
    """Above the diagonal exp(+64·1000) overflows: masking after exp would give 0·inf = NaN."""
    inputs = make_inputs(130, groups=2, dtype=torch.float32)
    inputs["A"][0] = -1000.0
    inputs["dt"] = torch.ones_like(inputs["dt"])
    assert_close(run(ssd_torch, inputs, chunk_size=64), run(ssd_reference, inputs), TOLERANCE[torch.float32])


def test_bf16_inputs():
    """Only the results are rounded to bf16 (8 bits): computation is fp32, and the state stays fp32."""
    inputs = make_inputs(200, groups=2, dtype=torch.float32)
    for name in ("x", "B", "C"):
        inputs[name] = inputs[name].bfloat16()
    actual = run(ssd_torch, inputs, chunk_size=64)
    assert actual["y"].dtype == actual["dx"].dtype == torch.bfloat16
    assert actual["final_state"].dtype == torch.float32

    # The cotangent of a bf16 y is bf16: round the reference's too, or the rounding would count as an error.
    def rounded_y(*arguments, **options):
        y, final_state = ssd_reference(*arguments, **options)
        return y.bfloat16(), final_state

    expected = run(rounded_y, {name: t.double() for name, t in inputs.items()})
    assert_close(actual, expected, 2**-8)
    assert_close({"final_state": actual["final_state"]}, {"final_state": expected["final_state"]}, 1e-5)


def test_gradcheck():
    inputs = make_inputs(7, groups=2, batch=1)
    inputs["x"], inputs["initial_state"] = inputs["x"][..., :2], inputs["initial_state"][..., :2, :3]
    inputs["B"], inputs["C"] = inputs["B"][..., :3], inputs["C"][..., :3]
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_torch(*tensors[:5], chunk_size=3, initial_state=tensors[5], seq_idx=seq_idx)

    assert torch.autograd.gradcheck(function, [t.contiguous().requires_grad_() for t in inputs.values()])


# With chunks of 16: documents end inside a chunk, at its edge, beside it, after one token, after several chunks.
DOCUMENTS = ([5, 11, 15, 2, 1, 46], [16, 1, 31, 32], [80], [79, 1], [1, 33, 46])


@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
@pytest.mark.parametrize("function", [ssd_reference, ssd_torch])
def test_packed_documents_equal_separate_ones(function, lengths):
    options = {} if function is ssd_reference else {"chunk_size": 16}
    inputs = make_inputs(sum(lengths), groups=2)
    # Numbers may recur (0, 1, 0, 1, …): only changes matter.
    seq_idx = torch.tensor([d % 2 for d, n in enumerate(lengths) for _ in range(n)]).expand(BATCH, -1)
    state = inputs["initial_state"]
    y, final_state = function(*tokens_of(inputs, slice(None)), initial_state=state, seq_idx=seq_idx, **options)
    start = 0
    for length in lengths:
        tokens = slice(start, start + length)
        y_alone, state_alone = function(*tokens_of(inputs, tokens), initial_state=state, **options)
        torch.testing.assert_close(y[:, tokens], y_alone, rtol=1e-12, atol=1e-12)
        # The initial state belongs to the first document only.
        start, state = start + length, None
    torch.testing.assert_close(final_state, state_alone, rtol=1e-12, atol=1e-12)


def test_gradients_of_packed_documents():
    """The rows of a batch are packed differently."""
    seq_idx = torch.repeat_interleave(torch.arange(12), torch.tensor(DOCUMENTS[0] + DOCUMENTS[1] + [0, 0])).view(2, 80)
    inputs = make_inputs(80, groups=2)
    expected = run(ssd_reference, inputs, seq_idx=seq_idx)
    assert_close(run(ssd_torch, inputs, chunk_size=16, seq_idx=seq_idx), expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize(("batch", "length"), [(1, 700), (3, 300), (5, 90)])
def test_documents_across_blocks_and_rows(batch, length):
    """A block is 256 tokens: several blocks per row, a full block and a partial one, rows that share a block."""
    inputs = make_inputs(length, groups=2, batch=batch)
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 0.02
    seq_idx = starts.cumsum(1)
    expected = run(ssd_reference, inputs, seq_idx=seq_idx)
    assert_close(run(ssd_torch, inputs, chunk_size=64, seq_idx=seq_idx), expected, TOLERANCE[torch.float64])


def test_what_is_computed_in_inference_mode_does_not_bind_training():
    inputs = make_inputs(20, groups=2, dtype=torch.float32, head_dim=HEAD_DIM + 64)
    with torch.inference_mode():
        expected, _ = ssd_torch(*(inputs[name] for name in NAMES[:5]), chunk_size=8)
    assert torch.equal(
        run(ssd_torch, {**inputs, "initial_state": 0 * inputs["initial_state"]}, chunk_size=8)["y"], expected
    )


@pytest.mark.parametrize("boundary", [5, 15, 16, 17, 40])
def test_nothing_leaks_between_documents(boundary):
    length = 50
    inputs = make_inputs(length, groups=2, dtype=torch.float32)
    seq_idx = (torch.arange(length) >= boundary).long().expand(BATCH, -1)
    perturbed = {name: t.clone() for name, t in inputs.items()}
    for name in ("x", "dt", "B", "C"):
        perturbed[name][:, :boundary] *= 1.5
    perturbed["initial_state"] += 1
    results = []
    for variant in (inputs, perturbed):
        leaves = [variant[name].requires_grad_() for name in NAMES]
        y, final_state = ssd_torch(*leaves[:5], chunk_size=16, initial_state=leaves[5], seq_idx=seq_idx)
        gradients = torch.autograd.grad(y[:, boundary:].sum() + final_state.sum(), leaves)
        by_name = dict(zip(NAMES, gradients, strict=True))
        for name in ("x", "dt", "B", "C"):
            assert not by_name[name][:, :boundary].any(), f"d{name} leaks"
        assert not by_name["initial_state"].any()
        results.append((y, final_state))
    (y, final_state), (y_perturbed, final_perturbed) = results
    assert not torch.equal(y[:, :boundary], y_perturbed[:, :boundary])
    assert torch.equal(y[:, boundary:], y_perturbed[:, boundary:])
    assert torch.equal(final_state, final_perturbed)


@pytest.mark.parametrize("split", [1, 50, 64, 127])
def test_two_parts_with_the_state_carried_equal_one_pass(split):
    inputs = make_inputs(128, groups=2)
    state = inputs["initial_state"]
    y, final_state = ssd_torch(*tokens_of(inputs, slice(None)), chunk_size=32, initial_state=state)
    parts = []
    for tokens in (slice(0, split), slice(split, None)):
        y_part, state = ssd_torch(*tokens_of(inputs, tokens), chunk_size=32, initial_state=state)
        parts.append(y_part)
    torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final_state, rtol=1e-12, atol=1e-12)


def test_decoding_equals_the_parallel_form():
    """Prefill in parallel, then 60 tokens one by one, in fp32."""
    inputs = make_inputs(160, groups=2, dtype=torch.float32)
    x, dt, A, B, C, state = inputs.values()
    y, final_state = ssd_torch(x, dt, A, B, C, chunk_size=64, initial_state=state)
    _, state = ssd_torch(*tokens_of(inputs, slice(0, 100)), chunk_size=64, initial_state=state)
    for t in range(100, 160):
        y_t, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        assert_close({"y": y_t}, {"y": y[:, t]}, 1e-5)
    assert_close({"state": state}, {"state": final_state}, 1e-5)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_flops_formula_counts_the_gemms_of_ssd_torch(groups):
    """Also proves that scores are computed per group, not per head."""
    inputs = make_inputs(128, groups)
    with FlopCounterMode(display=False) as counter:
        ssd_torch(*(inputs[name] for name in NAMES[:5]), chunk_size=32)
    sizes = StateSpaceConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        state_size=STATE,
        num_groups=groups,
        chunk_size=32,
    )
    assert counter.get_total_flops() == BATCH * 128 * sizes.scan_flops_per_token(128, whole_chunks=True)


def test_backends_are_chosen_by_name():
    inputs = [make_inputs(20, groups=2)[name] for name in NAMES[:5]]
    assert torch.equal(ssd(*inputs, chunk_size=8, backend="reference")[0], ssd_reference(*inputs)[0])
    assert torch.equal(ssd(*inputs, chunk_size=8)[0], ssd_torch(*inputs, chunk_size=8)[0])
    with pytest.raises(ValueError, match=r"backend='cuda' .*reference, torch"):
        ssd(*inputs, chunk_size=8, backend="cuda")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.flatten(2), r"x.shape=\[2, 20, 16\] is not"),
        ("x", lambda t: t[:, :0], r"length > 0"),
        ("B", lambda t: t.flatten(2), r"B.shape=\[2, 20, 16\] is not"),
        ("B", lambda t: t.repeat(1, 1, 2, 1)[:, :, :3], r"groups=3 does not divide heads=4; use one of 1, 2, 4"),
        ("C", lambda t: t[:, :19], r"C.shape=\[2, 19, 2, 8\] does not fit .* use \[2, 20, 2, 8\]"),
        ("dt", lambda t: t[..., :3], r"dt.shape=\[2, 20, 3\] .* use \[2, 20, 4\]"),
        ("A", lambda t: t[:3], r"A.shape=\[3\] .* use \[4\]"),
        ("initial_state", lambda t: t.mT, r"initial_state.shape=\[2, 4, 8, 4\] .* use \[2, 4, 4, 8\]"),
    ],
)
def test_shape_errors_name_value_and_remedy(name, change, message):
    inputs = make_inputs(20, groups=2)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        ssd(*(inputs[n] for n in NAMES[:5]), chunk_size=8, initial_state=inputs["initial_state"])


def test_option_errors_name_value_and_remedy():
    inputs = [make_inputs(20, groups=2)[name] for name in NAMES[:5]]
    with pytest.raises(ValueError, match=r"chunk_size=0 is not positive; use"):
        ssd(*inputs, chunk_size=0)
    with pytest.raises(ValueError, match=r"seq_idx.shape=\[2, 19\] .* use \[2, 20\]"):
        ssd(*inputs, chunk_size=8, seq_idx=torch.zeros(2, 19, dtype=torch.long))
    with pytest.raises(ValueError, match=r"seq_idx.dtype=torch.float32 .* use torch.int32"):
        ssd(*inputs, chunk_size=8, seq_idx=torch.zeros(2, 20))


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
def test_the_fused_kernels_are_taken_where_those_of_mamba_ssm_are(backend, available, monkeypatch):
    monkeypatch.setattr(ssd_module, "is_available", lambda x: available)
    monkeypatch.setattr(ssd_module, "import_error", lambda: None if available else ImportError())
    x, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    assert is_fused(backend, x, parameter, None) is (available and backend in ("auto", "triton"))
    assert not is_fused(backend, x.double(), parameter, None)
    seen = []
    torch.func.grad(lambda t: seen.append(is_fused(backend, x, t)) or t.sum())(torch.ones(2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert seen == [False] and not is_fused(backend, x, parameter)
