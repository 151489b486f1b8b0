"""mamba-ssm's kernels behind `ssd` against the recurrence; test_ssd_triton.py runs this file in a separate process.

On CPU tensors under Triton's interpreter (triton_interpreter.py), or on a GPU. "Relative" error and the reference are
those of test_ssd.py.
"""

# B=batch L=sequence H=heads P=head dim G=groups N=state

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from test_ssd import (  # pyright: ignore[reportMissingImports]
    HEADS,
    NAMES,
    assert_close,
    make_inputs,
    run,
)
from torch import Tensor

from megatron_txssm.ops.mamba2 import gated_rms_norm
from megatron_txssm.ops.rotary import apply_rotary
from megatron_txssm.ops.ssd import ssd, ssd_step
from megatron_txssm.ops.ssd_reference import accumulation_dtype, ssd_reference
from megatron_txssm.ops.ssd_reference import ssd_step as reference_step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Under TRITON_F32_DEFAULT=ieee, which the interpreter always follows; TF32 has 10 bits. bf16 has 8, and intermediates
# between products are rounded to it (the interpreter truncates). Not measured on a GPU yet (docs/gpu-status.md).
FP32 = 1e-5 if INTERPRETED or os.environ.get("TRITON_F32_DEFAULT") == "ieee" else 5e-3
BF16 = 2**-6
SIZES: Any = {"head_dim": 16, "state": 16}


def by_kernels(
    *tensors: Tensor, chunk_size: int = 32, initial_state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ssd` on the device; results and gradients are CPU tensors."""
    x, dt, A, B, C = (tensor.to(DEVICE) for tensor in tensors)
    initial_state, seq_idx = (t if t is None else t.to(DEVICE) for t in (initial_state, seq_idx))
    y, state = ssd(
        x, dt, A, B, C, chunk_size=chunk_size, initial_state=initial_state, seq_idx=seq_idx, backend="triton"
    )
    return y.cpu(), state.cpu()


def numbered(*rows: list[int], numbers: list[int] | None = None) -> Tensor:
    """seq_idx of rows of documents, from the documents' lengths."""
    return torch.stack(
        [torch.repeat_interleave(torch.tensor(numbers or range(len(row))), torch.tensor(row)) for row in rows]
    )


def check(inputs: dict[str, Tensor], tolerance: float = FP32, **options: Any) -> None:
    """Output, final state, and the gradients of all six inputs through both."""
    seq_idx = options.get("seq_idx")
    actual = run(by_kernels, {name: tensor.float() for name, tensor in inputs.items()}, **options)
    assert_close(actual, run(ssd_reference, inputs, seq_idx=seq_idx), tolerance)


@pytest.mark.parametrize(("length", "groups"), [(1, 2), (5, HEADS), (32, 1), (77, 1), (77, 2), (77, HEADS)])
def test_kernels_equal_the_recurrence(length: int, groups: int) -> None:
    check(make_inputs(length, groups, **SIZES))


def test_sizes_of_a_real_model() -> None:
    check(make_inputs(70, 1, batch=1, head_dim=64, state=128), chunk_size=64)


# With chunks of 16: documents end inside a chunk, several times in it, at its edge, after one token; and the last chunk
# is not full. The two rows of the batch are packed differently.
DOCUMENTS = (([5, 11, 3, 1, 25], [16, 1, 28]), ([45], [44, 1]), ([1, 33, 11], [17, 15, 13]))


@pytest.mark.parametrize("rows", DOCUMENTS, ids=str)
def test_packed_documents_behind_an_initial_state(rows: tuple[list[int], ...]) -> None:
    """The state belongs only to each row's first document, which may end in any chunk."""
    check(make_inputs(45, 2, **SIZES), chunk_size=16, seq_idx=numbered(*rows))


@pytest.mark.parametrize("numbers", [[7, 8, 9, 10, 11], [0, 1, 0, 1, 0], [-1, -2, -1, 0, -3]])
def test_the_change_of_a_number_counts_not_its_value(numbers: list[int]) -> None:
    x, dt, A, B, C, state = make_inputs(45, 2, torch.float32, **SIZES).values()
    lengths = [3, 17, 9, 10, 6]
    results = [
        by_kernels(x, dt, A, B, C, initial_state=state, chunk_size=16, seq_idx=numbered(lengths, lengths, numbers=n))
        for n in (numbers, [0, 1, 2, 3, 4])
    ]
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_training_without_a_state() -> None:
    """As in training: no initial state, and only the output is used."""
    inputs = make_inputs(45, 2, **SIZES)
    del inputs["initial_state"]
    results = []
    for function, dtype in ((by_kernels, torch.float32), (ssd_reference, torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs.values()]
        y, _ = function(*leaves)
        results.append(dict(zip(inputs, torch.autograd.grad(y.square().sum(), leaves), strict=True)))
    actual, expected = results
    assert_close(actual, expected, FP32)


def test_views_of_one_projection_as_the_mixer_makes_them() -> None:
    """Tokens before batch; x, B, C and dt side by side: only the last dimension is contiguous."""
    inputs = make_inputs(45, 2, **SIZES)
    widths = {name: inputs[name].flatten(2).shape[-1] for name in ("x", "B", "C", "dt")}
    packed_LBE = torch.cat([inputs[name].flatten(2) for name in widths], dim=-1).transpose(0, 1).contiguous()

    def gradient(function: Any, packed_LBE: Tensor) -> dict[str, Tensor]:
        leaf = packed_LBE.clone().requires_grad_()
        parts = dict(zip(widths, leaf.transpose(0, 1).split(list(widths.values()), dim=-1), strict=True))
        x, B, C = (parts[name].unflatten(-1, (-1, 16)) for name in ("x", "B", "C"))
        y, state = function(x, parts["dt"], inputs["A"].to(leaf), B, C)
        return {"y": y, "packed": torch.autograd.grad(y.square().sum() + state.square().sum(), leaf)[0]}

    assert_close(gradient(by_kernels, packed_LBE.float()), gradient(ssd_reference, packed_LBE), FP32)


@pytest.mark.parametrize("chunk_size", [1, 40, 64])
def test_any_chunk_size(chunk_size: int) -> None:
    *inputs, state = make_inputs(70, 1, torch.float32, **SIZES).values()
    y, final = by_kernels(*inputs, initial_state=state, chunk_size=chunk_size)
    expected = ssd_reference(*(tensor.double() for tensor in inputs), initial_state=state.double())
    assert_close({"y": y, "state": final}, dict(zip(("y", "state"), expected, strict=True)), FP32)


def test_bf16_inputs() -> None:
    inputs = make_inputs(45, 2, torch.float32, **SIZES)
    for name in ("x", "B", "C"):
        inputs[name] = inputs[name].bfloat16()
    seq_idx = numbered(*DOCUMENTS[0])
    actual = run(by_kernels, inputs, chunk_size=16, seq_idx=seq_idx)
    assert actual["y"].dtype == actual["dx"].dtype == torch.bfloat16
    assert actual["final_state"].dtype == actual["ddt"].dtype == actual["dA"].dtype == torch.float32

    # The cotangent of a bf16 y is bf16: round the reference's too, or the rounding would count as an error.
    def rounded_y(*arguments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        y, final_state = ssd_reference(*arguments, **options)
        return y.bfloat16(), final_state

    expected = run(rounded_y, {name: t.double() for name, t in inputs.items()}, seq_idx=seq_idx)
    assert_close(actual, expected, BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("groups", "width"), [(1, 2), (6, 24), (8, 128)])
def test_the_rotation_equals_that_of_pytorch(dtype: torch.dtype, batched: bool, groups: int, width: int) -> None:
    """On a view into the packed projection, tokens before batch: values, gradient, and the gradient's gradient."""
    batch, length = 2, 7
    tensors = [torch.randn(length, batch, 5 + groups * width, device=DEVICE).to(dtype)]
    tensors += [torch.randn(batch, length, groups, width, device=DEVICE).to(dtype)]
    angles = torch.randn(*[batch] * batched, length, width // 2, device=DEVICE)

    def results(backend: str, *tensors: Tensor) -> dict[str, Tensor]:
        packed, cotangent = (tensor.clone().requires_grad_() for tensor in tensors)
        x_BLGN = packed.transpose(0, 1)[..., 5:].unflatten(-1, (groups, width))
        y = apply_rotary(x_BLGN, angles.cos(), angles.sin(), backend=backend)
        (dx,) = torch.autograd.grad(y, packed, cotangent, create_graph=True)
        (dcotangent,) = torch.autograd.grad(dx, cotangent, packed)
        return {"y": y, "dx": dx, "dcotangent": dcotangent}

    # Rounded once; the interpreter truncates.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    assert_close(results("triton", *tensors), results("torch", *(tensor.double() for tensor in tensors)), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, DOCUMENTS[0]], ids=["one-document", "documents"])
def test_what_passes_by_the_state_in_the_kernels_is_what_pytorch_adds(rows: Any, dtype: torch.dtype) -> None:
    """D, its gradient and all others, against `ssd` in PyTorch."""
    given = make_inputs(45, 2, torch.float32, **SIZES) | {"D": torch.linspace(-2, 3, HEADS)}
    del given["initial_state"]
    for name in ("x", "B", "C"):
        given[name] = given[name].to(dtype)
    seq_idx = None if rows is None else numbered(*rows)
    cotangent = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def results(backend: str, device: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: tensor.to(device).requires_grad_() for name, tensor in given.items()}
        options = {"chunk_size": 16, "seq_idx": None if seq_idx is None else seq_idx.to(device)}
        *inputs, D_H = leaves.values()
        y, state = ssd(*inputs, D_H=D_H, backend=backend, **options)
        gradients = torch.autograd.grad(y, list(leaves.values()), cotangent.to(y))
        found = {"y": y, "state": state} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
        return {name: tensor.cpu() for name, tensor in found.items()}

    expected = results("torch", "cpu", {name: tensor.double() for name, tensor in given.items()})
    actual = results("triton", DEVICE, given)
    assert actual["y"].dtype == dtype and actual["dD"].dtype == torch.float32
    assert_close(actual, expected, FP32 if dtype == torch.float32 else BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "width"), [(1, 24), (2, 16), (3, 7)])
def test_the_gated_norm_equals_that_of_pytorch(dtype: torch.dtype, groups: int, width: int) -> None:
    """z is a view into the packed projection, as in the mixer, with more rows than a program takes."""
    channels = groups * width
    shapes = {"y": (9, 2, channels), "packed": (9, 2, channels + 5), "weight": (channels,)}
    given = {name: torch.randn(shape).to(DEVICE, dtype) for name, shape in shapes.items()}
    cotangent = torch.randn(shapes["y"], device=DEVICE).to(dtype)

    def results(backend: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        z, y, weight = leaves["packed"][..., :channels], leaves["y"], leaves["weight"]
        out = gated_rms_norm(y, z, weight, groups=groups, eps=1e-5, backend=backend)
        assert out.is_contiguous() and out.dtype == y.dtype
        gradients = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))
        return {"out": out.cpu(), **{f"d{name}": g.cpu() for name, g in zip(leaves, gradients, strict=True)}}

    actual, expected = results("triton", given), results("torch", {n: t.float() for n, t in given.items()})
    assert_close(actual, expected, 1e-5 if dtype == torch.float32 else BF16)
    assert actual["dpacked"][..., channels:].count_nonzero() == 0


def test_the_gated_norm_is_the_kernel_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_ssm.ops.triton import layernorm_gated  # pyright: ignore[reportMissingImports]

    calls = []
    monkeypatch.setattr(layernorm_gated, "rmsnorm_fn", lambda y, *_, **options: (calls.append(options), y)[1])

    def called(*shape: int, groups: int = 1, backend: str = "triton", device: str = DEVICE, dtype: Any = None) -> bool:
        y = torch.empty(*shape, dtype=dtype, device=device)
        before = len(calls)
        gated_rms_norm(y, y, y.new_empty(shape[-1]), groups=groups, eps=1e-5, backend=backend)
        return len(calls) > before

    assert called(2, 2**14) and called(2, 2**15, groups=2)
    # More than a program holds, or than 32 bits address; another backend, another dtype.
    assert not called(2, 2**14 + 1)
    assert not called(2**19, 2**12 + 2, device="meta")
    assert not called(2, 8, backend="torch") and not called(2, 8, dtype=torch.float64)
    assert calls[-1] == {"z": calls[-1]["z"], "eps": 1e-5, "group_size": 2**14, "norm_before_gate": False}


def one_token(groups: int, dtype: torch.dtype) -> list[Tensor]:
    """x, dt, A, B, C of a token, and the state before it."""
    inputs = make_inputs(1, groups, dtype, **SIZES)
    return [tensor if name in ("A", "initial_state") else tensor[:, 0] for name, tensor in inputs.items()]


@pytest.mark.parametrize("passed_by", [False, True], ids=["", "D"])
@pytest.mark.parametrize("groups", [1, 2, HEADS])
def test_a_step_equals_the_recurrences_and_leaves_the_old_state(groups: int, passed_by: bool) -> None:
    x, dt, A, B, C, state = (tensor.to(DEVICE) for tensor in one_token(groups, torch.float32))
    before, D = state.clone(), torch.linspace(-2, 3, HEADS)
    y, new = ssd_step(x, dt, A, B, C, state, D_H=D.to(DEVICE) if passed_by else None, backend="triton")
    exact = one_token(groups, torch.float64)
    expected, state_after = reference_step(*exact)
    if passed_by:
        expected = expected + D.double()[:, None] * exact[0]
    assert_close({"y": y.cpu(), "state": new.cpu()}, {"y": expected, "state": state_after}, FP32)
    assert torch.equal(state, before)


def test_a_step_that_is_differentiated_is_not_the_kernels() -> None:
    x, dt, A, B, C, state = (tensor.to(DEVICE) for tensor in one_token(2, torch.float32))
    y, new = ssd_step(x, dt, A, B, C, state.requires_grad_(), backend="triton")
    (gradient,) = torch.autograd.grad(y.sum() + new.sum(), state)
    assert gradient.abs().min() > 0


def test_what_the_kernels_cannot_do_is_refused() -> None:
    inputs = [make_inputs(20, 2, **SIZES)[name].to(DEVICE) for name in NAMES[:5]]
    with pytest.raises(ValueError, match=r"x.dtype=torch.float64 is not .* use fp32, bf16 or backend='torch'"):
        ssd(*inputs, chunk_size=16, backend="triton")
    # 2^31 elements, none of them in memory.
    x, dt, B = (torch.empty(1, 2**20, *shape, device="meta") for shape in ((32, 64), (32,), (4, 128)))
    with pytest.raises(ValueError, match=r"x.shape=\[1, 1048576, 32, 64\] is more .* use a smaller micro-batch"):
        ssd(x, dt, torch.empty(32, device="meta"), B, B, chunk_size=256, backend="triton")


def test_deterministic_algorithms_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_ssm.utils.determinism import use_deterministic_mode  # pyright: ignore[reportMissingImports]

    monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    for on in (True, False):
        torch.use_deterministic_algorithms(on)
        assert use_deterministic_mode() is on
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.skipif(INTERPRETED, reason="an interpreter adds in one order; a GPU may not")
def test_deterministic_kernels_repeat_their_bits() -> None:
    inputs = make_inputs(4096, 1, torch.float32, head_dim=64, state=128)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    first, second = (run(by_kernels, inputs, chunk_size=256) for _ in range(2))
    torch.use_deterministic_algorithms(before)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# The layer between its projections (ssd_fused_triton.py) against PyTorch's softplus and rotation and the recurrence.
WIDTH = 16
PADDING = 5


def layer_inputs(length: int, groups: int, batch: int = 2) -> dict[str, Tensor]:
    """The packed projection and the parameters, with A and dt distributed as in `make_inputs`."""
    inputs = make_inputs(length, groups, torch.float32, batch=batch, **SIZES)
    bias_H = torch.linspace(-7, -2, HEADS)
    raw_BLH = torch.expm1(inputs["dt"]).log() - bias_H
    parts = [inputs[name].flatten(2) for name in "xBC"] + [raw_BLH, torch.randn(batch, length, PADDING)]
    packed_LBE = torch.cat(parts, dim=-1).transpose(0, 1).contiguous()
    return {"packed": packed_LBE, "A_log": (-inputs["A"]).log(), "dt_bias": bias_H}


def layer_tables(length: int) -> tuple[Tensor, Tensor]:
    angles_LR = torch.outer(torch.arange(length), 0.3 ** torch.arange(WIDTH / 2))
    return angles_LR.cos(), angles_LR.sin()


def fused(
    packed_LBE: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None,
    *,
    groups: int,
    rotated: bool,
    seq_idx: Tensor | None,
) -> Tensor:
    from megatron_txssm.ops.ssd_fused_triton import Sizes, scan_packed

    dt_bias, seq_idx = (t if t is None else t.to(DEVICE) for t in (dt_bias, seq_idx))
    cos, sin = (table.to(DEVICE) for table in layer_tables(packed_LBE.shape[0]))
    sizes = Sizes(SIZES["head_dim"], groups, WIDTH, chunk_size=16)
    tables = (cos, sin) if rotated else None
    return scan_packed(packed_LBE.to(DEVICE), A_log.to(DEVICE), dt_bias, tables, sizes, seq_idx=seq_idx).cpu()


def unfused(
    packed_LBE: Tensor,
    A_log: Tensor,
    dt_bias: Tensor | None,
    *,
    groups: int,
    rotated: bool,
    seq_idx: Tensor | None,
    by: str = "torch",
) -> Tensor:
    """The same step by step, in PyTorch; with `by="triton"`, steps that have kernels use them."""
    inner, width = HEADS * SIZES["head_dim"], groups * WIDTH
    x, B, C, dt, _ = packed_LBE.transpose(0, 1).split([inner, width, width, HEADS, PADDING], dim=-1)
    B, C = (t.unflatten(-1, (groups, WIDTH)) for t in (B, C))
    if rotated:
        device = DEVICE if by == "triton" else "cpu"
        tables = [table.to(device) for table in layer_tables(packed_LBE.shape[0])]
        B, C = (apply_rotary(t.to(device), *tables, backend=by).cpu() for t in (B, C))
    dt = dt.to(accumulation_dtype(dt))
    dt = torch.nn.functional.softplus(dt if dt_bias is None else dt + dt_bias)
    scan: Any = partial(by_kernels, chunk_size=16) if by == "triton" else ssd_reference
    y, _ = scan(x.unflatten(-1, (HEADS, -1)), dt, -A_log.exp(), B, C, seq_idx=seq_idx)
    return y.transpose(0, 1).flatten(2)


def layer_results(function: Any, inputs: Mapping[str, Tensor | None], **options: Any) -> dict[str, Tensor]:
    """y, and the gradients of the projection's parts and of the parameters for one fixed cotangent."""
    leaves = {name: t if t is None else t.clone().requires_grad_() for name, t in inputs.items()}
    y = function(*leaves.values(), **options)
    # Gradients may be non-contiguous.
    cotangent = torch.randn(*y.shape[:2], 2 * y.shape[2], generator=torch.Generator().manual_seed(0))[..., ::2]
    y.backward(cotangent.to(y.dtype))
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    width = options["groups"] * WIDTH
    widths = {"dx": y.shape[-1], "dB": width, "dC": width, "ddt": HEADS, "dpadding": PADDING}
    parts = dict(zip(widths, found.pop("packed").split(list(widths.values()), dim=-1), strict=True))
    assert parts.pop("dpadding").count_nonzero() == 0
    return {"y": y, **parts, **found}


@pytest.mark.parametrize(
    ("length", "batch", "groups", "biased", "rotated"),
    [
        (45, 2, 1, True, True),
        (45, 2, 2, False, True),
        (33, 1, HEADS, True, True),
        (17, 3, 2, True, False),
        (2, 2, 1, False, False),
    ],
)
def test_the_fused_layer_equals_the_recurrence(
    length: int, batch: int, groups: int, biased: bool, rotated: bool
) -> None:
    inputs: dict[str, Any] = layer_inputs(length, groups, batch)
    if not biased:
        inputs["dt_bias"] = None
    options = {"groups": groups, "rotated": rotated, "seq_idx": None}
    actual = layer_results(fused, inputs, **options)
    exact = {name: t if t is None else t.double() for name, t in inputs.items()}
    assert_close(actual, layer_results(unfused, exact, **options), FP32)


def test_the_fused_layers_dt_has_all_digits_however_small() -> None:
    """One token per sample: y and dx scale with dt, ddt with its slope; each is compared relative to itself."""
    inputs = layer_inputs(1, 1, batch=13)
    inputs["packed"][..., -PADDING - HEADS : -PADDING] = torch.linspace(-25, 35, 13)[:, None]
    options = {"groups": 1, "rotated": False, "seq_idx": None}
    actual = layer_results(fused, inputs, **options)
    expected = layer_results(unfused, {n: t.double() for n, t in inputs.items()}, **options)
    for sample in range(13):
        ours, theirs = ({n: tensors[n][:, sample] for n in ("y", "dx", "ddt")} for tensors in (actual, expected))
        assert_close(ours, theirs, FP32)


@pytest.mark.parametrize(("rows", "numbers"), [(DOCUMENTS[0], None), ([[3, 17, 9, 10, 6]] * 2, [0, 1, 0, 1, 0])])
def test_the_fused_layer_with_packed_documents(rows: Any, numbers: list[int] | None) -> None:
    inputs = layer_inputs(45, 2)
    options = {"groups": 2, "rotated": True, "seq_idx": numbered(*rows, numbers=numbers)}
    actual = layer_results(fused, inputs, **options)
    assert_close(actual, layer_results(unfused, {n: t.double() for n, t in inputs.items()}, **options), FP32)


def test_the_fused_layer_in_bf16_equals_the_kernels_one_after_the_other() -> None:
    """Both round equally: the steps' own error is bounded by `test_bf16_inputs`."""
    inputs = layer_inputs(45, 2)
    inputs["packed"] = inputs["packed"].bfloat16()
    options = {"groups": 2, "rotated": True, "seq_idx": numbered(*DOCUMENTS[0])}
    actual = layer_results(fused, inputs, **options)
    expected = layer_results(unfused, inputs, **options, by="triton")
    assert {name for name, tensor in actual.items() if tensor.dtype == torch.float32} == {"A_log", "dt_bias"}
    # dt's gradient is rounded (truncated by the interpreter) only here; the others are identical.
    assert_close(actual, expected, BF16 / 2)
    assert_close({n: actual[n] for n in ("A_log", "dt_bias")}, {n: expected[n] for n in ("A_log", "dt_bias")}, FP32)


def test_the_fused_layer_puts_gradients_where_they_belong() -> None:
    """Nothing is concatenated, and the in-projection receives its gradient in its own layout."""
    from megatron_txssm.ops.ssd_fused_triton import Sizes, scan_packed

    packed_LBE, A_log, dt_bias = (tensor.to(DEVICE).requires_grad_() for tensor in layer_inputs(5, 2).values())
    tables: Any = [table.to(DEVICE) for table in layer_tables(5)]
    y = scan_packed(packed_LBE, A_log, dt_bias, tables, Sizes(16, 2, WIDTH, 16))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (gradient,) = torch.autograd.grad(y, packed_LBE, torch.ones_like(y))
    assert gradient.is_contiguous() and y.is_contiguous()
    assert "aten::cat" not in {event.name for event in profile.events() or []}


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_fused_layer_under_recomputation(reentrant: bool) -> None:
    inputs = layer_inputs(20, 1)
    options = {"groups": 1, "rotated": True, "seq_idx": None}

    def recomputed(*tensors: Any, **options: Any) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        y: Any = checkpoint(lambda *t: fused(*t, **options), *tensors, use_reentrant=reentrant)
        return y

    actual, expected = (layer_results(function, inputs, **options) for function in (recomputed, fused))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_the_fused_layer_refuses_what_the_kernels_cannot_address() -> None:
    from megatron_txssm.ops.ssd_fused_triton import Sizes, scan_packed

    packed_LBE, A_log = torch.empty(2**20, 1, 2**12, device="meta"), torch.empty(32, device="meta")
    with pytest.raises(ValueError, match=r"x.shape=\[1, 1048576, 32, 64\] is more .* use a smaller micro-batch"):
        scan_packed(packed_LBE, A_log, None, None, Sizes(64, 4, 128, 256))
